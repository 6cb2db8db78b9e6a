"""Historical features, side by side with Feast's default offline store.

    python benchmarks/feast_join.py                 # ten minutes; writes benchmarks/results/feast_join.{md,json}
    python benchmarks/feast_join.py --size 3000x200x40 --runs 1 --skip feast

Feast's offline store computes no windows: it looks up, for each row of a spine, the newest row of
features that somebody else has computed. So that is what it is asked, on rows of five running totals
after each activity; Heliostat is asked the same on the same rows, and the answers are compared. Beside it
Heliostat computes five features over 30 days from the raw activities, for the same spine.

Two things are timed of everybody: the call, from a pandas frame to a pandas frame; and all of it, from
the spine's file to a file with the answer.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import activities
from benchmarks.online_read import FEAST_REQUIREMENTS
from benchmarks.peers import ROOT, Contender, Report, Turns, facts, interleaved, python_of
from benchmarks.programs import LimitExceededError, Limits, Program, ProgramEndedError
from heliostat import EventSource, FeatureView, Latest, cluster
from heliostat.feature_store import FeatureStore
from heliostat.features.bucket_join import SMALL_JOIN
from heliostat.schema import TIMESTAMP
from heliostat.settings import RaySettings, Settings, StorageSettings
from heliostat.workspace import Workspace

FEAST, ALONE, ON_RAY = "Feast", "Heliostat, one process", "Heliostat on Ray"
NEWEST, WINDOWS = "newest row", "windows of 30 days"
TARGET = 10.0
VALUES = ("activities", "duration", "longest", "weight", "last_weight")
WINDOWED = ("activity_count", "avg_session_duration", "days_since_last", "active_days", "activity_score")
TIME = "event_timestamp"
BUCKETS = 16
_OBJECT_STORE_BYTES = 2 * 2**30
_LONG_S = 30.0
_SHORT_S, _SHORT_RUNS = 5.0, 3

feature_rows = EventSource(
    "feature_rows",
    schema=pa.schema(
        [
            ("row_id", pa.int64()),
            ("user_id", pa.int64()),
            ("event_timestamp", TIMESTAMP),
            *((name, pa.float64()) for name in VALUES),
        ]
    ),
    entity=activities.user,
    event_time="event_timestamp",
    event_id="row_id",
)
user_values = FeatureView(
    "user_values", version=1, source=feature_rows, features={name: Latest(name) for name in VALUES}
)
QUESTIONS = {NEWEST: (user_values, VALUES), WINDOWS: (activities.user_features, WINDOWED)}


@dataclass(frozen=True)
class Size:
    """How much is joined: ``eventsxrowsxusers``."""

    events: int
    rows: int
    users: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read ``200000x200000x2000``."""
        return cls(*(int(part) for part in text.split("x")))


SIZES = ("200000x200000x100000", "200000x200000x2000", "2000000x200000x20000", "10000000x1000000x100000")


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        sizes: Each one table.
        runs: Timed runs of each contender, after one that isn't.
        limits: Of Feast, for one join.
    """

    sizes: tuple[Size, ...]
    runs: int
    limits: Limits


# ── Data at rest ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Place:
    """Where the files of one size are."""

    folder: Path

    @property
    def feature_rows(self) -> Path:
        """Five running totals of a user after each activity, in order of time."""
        return self.folder / "feature_rows.parquet"

    @property
    def spine(self) -> Path:
        """Row, user, instant."""
        return self.folder / "spine.parquet"

    def answer(self, contender: str, question: str = NEWEST) -> Path:
        """What a contender wrote."""
        return self.folder / f"{contender}, {question}.parquet"

    @property
    def settings(self) -> Settings:
        """Of a project whose event log holds activities and feature rows."""
        storage = StorageSettings(root=str(self.folder / "log"), buckets=BUCKETS)
        return Settings(home=self.folder / "home", storage=storage)


def prepare(place: Place, size: Size) -> None:
    """Generate activities, feature rows and the spine, and put them to rest for both."""
    place.folder.mkdir(parents=True)
    events = activities.events(size.events, size.users, seed=0)
    spine = activities.spine(size.rows, size.users, seed=0).rename_columns(["user_id", TIME])
    rows = running_totals(events)
    pq.write_table(spine.append_column("row", pa.array(np.arange(size.rows))), place.spine)
    pq.write_table(rows.drop_columns("row_id"), place.feature_rows)
    for source, table in ((activities.user_activities, events), (feature_rows, rows)):
        log = Workspace.open(place.settings).event_log
        with log.bulk(source, ingested_us=activities.START_US) as bulk:
            for first in range(0, table.num_rows, 1_000_000):
                bulk.add(table.slice(first, 1_000_000))
            bulk.commit()


def running_totals(events: pa.Table) -> pa.Table:
    """What a pipeline would have written after each activity: the columns of `feature_rows`."""
    users = events.column("user_id").to_numpy()
    order = np.argsort(users, kind="stable")
    grouped = users[order]
    starts = np.flatnonzero(np.append(True, grouped[1:] != grouped[:-1]))
    lengths = np.diff(np.append(starts, len(users)))

    def running(values: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.cumsum(values)
        return total - np.repeat(total[starts] - values[starts], lengths)

    durations = np.nan_to_num(events.column("session_duration").to_numpy(zero_copy_only=False))[order]
    kinds = events.column("type").combine_chunks().dictionary_encode()
    by_kind = np.array([activities.WEIGHTS[kind] for kind in kinds.dictionary.to_pylist()])
    weights = by_kind[kinds.indices.to_numpy()][order]
    # Within a user's run the maximum starts anew: users are kept apart by an offset.
    offset = np.repeat(np.arange(len(starts)) * 1e7, lengths)
    columns = {
        "activities": running(np.ones(len(users))),
        "duration": running(durations),
        "longest": np.maximum.accumulate(durations + offset) - offset,
        "weight": running(weights),
        "last_weight": weights,
    }
    back = np.empty(len(users), dtype=np.int64)
    back[order] = np.arange(len(users))
    named = {name: pa.array(values[back]) for name, values in columns.items()}
    keys = {"row_id": events.column("event_id"), "user_id": events.column("user_id")}
    return pa.table({**keys, "event_timestamp": events.column("happened_at"), **named}, schema=feature_rows.schema)


# ── Contenders ──────────────────────────────────────────────────────────────────────


@cache
def opened(place: Place, question: str) -> FeatureStore:
    """A store that stays open, as Feast's does."""
    store = FeatureStore.open(place.settings, definitions=[QUESTIONS[question][0]])
    atexit.register(store.close)
    return store


@dataclass(frozen=True)
class Took:
    """How long one join took.

    Attributes:
        files: From the spine's file to the answer's, seconds.
        frames: From a pandas frame to a pandas frame, seconds.
    """

    files: float
    frames: float


@cache
def frame_of(spine: Path) -> pd.DataFrame:
    """The spine as a program holds it."""
    return pd.read_parquet(spine)


def heliostat_join(place: Place, question: str, contender: str) -> Took:
    """The spine's file -> the join -> the answer's file, and then frame to frame; on Ray where it is connected."""
    store = opened(place, question)
    view, names = QUESTIONS[question]
    began = time.perf_counter()
    joined = store.get_historical(pq.read_table(place.spine), [view[name] for name in names], as_of=TIME)
    columns = ["row", *(view[name].name for name in names)]
    pq.write_table(joined.select(columns).rename_columns(["row", *names]), place.answer(contender, question))
    files, frame = time.perf_counter() - began, frame_of(place.spine)
    began = time.perf_counter()
    store.get_historical(frame, [view[name] for name in names], as_of=TIME)
    return Took(files, time.perf_counter() - began)


def feast_join(program: Program, place: Place, limits: Limits) -> Took:
    """The same in Feast's process; the call is a part of the whole there."""
    names = [f"{user_values.name}:{name}" for name in VALUES]
    asked = {"spine": str(place.spine), "features": names, "out": str(place.answer(FEAST))}
    answer = program.ask_within(limits, do="join", **asked)
    return Took(float(answer["seconds"]), float(answer["frames"]))


@dataclass
class Outcome:
    """What one size's run found.

    Attributes:
        turns: What each contender needed from file to file, by its name and the question.
        frames: From frame to frame, a figure a run, those that warmed up included.
        stopped: Why Feast has no figure; empty if it has.
        differences: Where Feast's answer differs from ours, in words.
        lost: Spine rows that Feast left out of its answer.
        version: Feast's.
    """

    turns: dict[tuple[str, str], Turns] = field(default_factory=dict)
    frames: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    stopped: str = ""
    differences: list[str] = field(default_factory=list)
    lost: int = 0
    version: str = "skipped"

    def noting(self, who: tuple[str, str], work: Callable[[], Took]) -> Callable[[], float]:
        """The work, with the time of the call noted."""

        def noted() -> float:
            took = work()
            self.frames.setdefault(who, []).append(took.frames)
            return took.files

        return noted

    def frames_s(self, who: tuple[str, str]) -> float:
        """The median of the timed calls, seconds."""
        return statistics.median(self.frames[who][-len(self.turns[who].seconds) :])


def run(place: Place, size: Size, plan: Plan, skip: Sequence[str]) -> Outcome:
    """All contenders on one size, in turns; needs a connected Ray."""
    outcome = Outcome()
    print(f"{size.events:,} events of {size.users:,} users, {size.rows:,} rows: putting them to rest …", flush=True)
    # In a process of its own, so that its memory isn't counted as anybody's.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as aside:
        aside.submit(prepare, place, size).result()
    with contextlib.ExitStack() as stack:
        contenders: dict[tuple[str, str], Contender] = {}
        apart: list[int] = []
        runs = plan.runs
        if "feast" not in skip:
            python = python_of("feast", FEAST_REQUIREMENTS)
            options = ["--folder", str(place.folder)]
            program = stack.enter_context(Program.started(python, "feast_store.py", *options, name=FEAST))
            apart.append(program.pid)
            feast = _feast_contender(program, place, plan, outcome)
            contenders |= {} if feast is None else {(FEAST, NEWEST): feast}
            runs = runs if feast is None else max(runs, feast.runs)
        worker = stack.enter_context(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")))
        apart.append(worker.submit(os.getpid).result())
        for question in QUESTIONS:
            alone = outcome.noting((ALONE, question), _alone(worker, place, question))
            on_ray = outcome.noting((ON_RAY, question), partial(heliostat_join, place, question, ON_RAY))
            contenders[ALONE, question] = Contender(alone, runs, pid=apart[-1])
            contenders[ON_RAY, question] = Contender(on_ray, runs, warm_ups=2, without=tuple(apart))
        named = {f"{who}, {question}": each for (who, question), each in contenders.items()}
        outcome.turns = dict(zip(contenders, interleaved(named).values(), strict=True))
    if (FEAST, NEWEST) in outcome.turns:
        outcome.lost, outcome.differences = compare(place)
    return outcome


def _alone(worker: ProcessPoolExecutor, place: Place, question: str) -> Callable[[], Took]:
    return lambda: worker.submit(heliostat_join, place, question, ALONE).result()


def _feast_contender(program: Program, place: Place, plan: Plan, outcome: Outcome) -> Contender | None:
    """Feast, if its first join stays within the limits; the outcome gets why it doesn't."""
    outcome.version = str(program.greeting["version"])
    program.ask(do="apply", views={user_values.name: {"file": str(place.feature_rows), "features": VALUES}})
    try:
        first = feast_join(program, place, plan.limits).files
    except (LimitExceededError, ProgramEndedError) as error:
        outcome.stopped = error.what if isinstance(error, LimitExceededError) else str(error)
        print(f"  {error}", flush=True)
        return None
    print(f"  {FEAST}: first run, {first:.2f} s", flush=True)
    runs = 1 if first > _LONG_S else plan.runs if first > _SHORT_S else _SHORT_RUNS * plan.runs
    work = outcome.noting((FEAST, NEWEST), lambda: feast_join(program, place, plan.limits))
    return Contender(work, runs, pid=program.pid)


def compare(place: Place) -> tuple[int, list[str]]:
    """Compare Feast's answer with both of ours, bit by bit; null is null.

    Returns:
        How many spine rows Feast left out, and what differs in the others, in words.
    """
    theirs = pq.read_table(place.answer(FEAST)).sort_by("row")
    there = theirs.column("row").to_numpy()
    found: list[str] = []
    lost = 0
    for contender in (ALONE, ON_RAY):
        ours = pq.read_table(place.answer(contender)).sort_by("row")
        lost = ours.num_rows - len(there)
        for name in VALUES:
            left = ours.column(name).to_numpy(zero_copy_only=False)
            if not np.isnan(np.delete(left, there)).all():
                found.append(f"{FEAST} has no row where {contender} has a value of {name}")
            left, right = left[there], theirs.column(name).to_numpy(zero_copy_only=False)
            differs = ~((left == right) | (np.isnan(left) & np.isnan(right)))
            if differs.any():
                at = int(np.flatnonzero(differs)[0])
                said = f"in row {there[at]}: {FEAST} {right[at]!r}, {contender} {left[at]!r}"
                found.append(f"{name} differs in {int(differs.sum()):,} rows; {said}")
    return lost, found


def report(plan: Plan, outcomes: Sequence[tuple[Size, Outcome]]) -> Report:
    """The table, and what a reader must know of it."""
    rows: list[list[object]] = []
    for size, outcome in outcomes:
        what = [size.events, size.rows, size.users]
        if outcome.stopped:
            rows.append([*what, NEWEST, FEAST, outcome.stopped, "", "", "", "", ""])
        feast = FEAST, NEWEST
        for who, turns in outcome.turns.items():
            seconds = outcome.frames_s(who), turns.median_s
            ratios: list[object] = ["", ""]
            if feast in outcome.turns:
                theirs = outcome.frames_s(feast), outcome.turns[feast].median_s
                ratios = ["1" if who == feast else one / other for one, other in zip(theirs, seconds, strict=True)]
            target = f"≥ {TARGET:g}" if who != feast and feast in outcome.turns else ""
            (frames, files), (by_frames, by_files) = seconds, ratios
            peak = turns.peak_bytes / 2**30
            rows.append([*what, who[1], who[0], frames, by_frames, target, files, by_files, peak])
    differences = [each for _, outcome in outcomes for each in outcome.differences]
    lost = ", ".join(f"{outcome.lost:,} of {size.rows:,}" for size, outcome in outcomes if outcome.lost)
    limits = f"{plan.limits.seconds:g} s and {plan.limits.memory_bytes / 2**30:.0f} GiB"
    notes = [
        "Newest row: five values of the user's newest row before each spine row's instant: all that Feast does.",
        "The rows at rest were computed by somebody beforehand, after each activity; that isn't timed.",
        "Windows of 30 days: five features, computed from as many raw activities, for the same spine.",
        "Seconds: of the call, warm, from a pandas frame to a pandas frame: what is at rest is read in it.",
        "From file to file: beside it the spine's Parquet file read, and one with the answer written.",
        (
            f"Medians of {plan.runs} runs in turns; {_SHORT_RUNS * plan.runs} where Feast's first took less than"
            f" {_SHORT_S:g} s; Feast has 1 where it took more than {_LONG_S:g} s."
        ),
        "Both have their store open before; Heliostat looks for the log's newest version in each run.",
        f"Feast was stopped beyond {limits} for one join. It reads a Parquet file, Heliostat its event log.",
        "Heliostat, one process: FeatureStore.get_historical where no Ray is connected.",
        f"Heliostat on Ray: where one is. Up to {SMALL_JOIN:,} rows and events it answers the same way.",
        "Users' events are skewed: the busiest of 100,000 has 1 % of them.",
        "Peak memory: of all of a contender's processes together; Ray, idle, holds most of a GiB.",
    ]
    if lost:
        notes.append(f"Feast left spine rows out of its answer whose users have later rows only: {lost}.")
    notes.append(
        f"Answers DIFFER: {'; '.join(differences)}."
        if differences
        else "Where Feast answered, both gave the same values, bit by bit."
    )
    return Report(
        title="Historical features: Feast's default offline store, and Heliostat",
        columns=(
            *("rows at rest", "spine rows", "users", "question", "contender", "seconds", "Feast / it", "target"),
            *("s, file to file", "Feast / it, file to file", "peak GiB"),
        ),
        rows=rows,
        notes=notes,
        facts=facts("ray", "pyarrow", "numpy", feast=outcomes[0][1].version, buckets=BUCKETS),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program.

    Returns:
        1 if the answers differ, otherwise 0, whoever was quicker.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", help="events x spine rows x users, 200000x200000x2000")
    parser.add_argument("--runs", type=int, default=3, help="timed ones of each contender")
    parser.add_argument("--feast-seconds", type=float, default=300.0, help="the most that one of Feast's joins takes")
    parser.add_argument("--feast-memory", type=float, default=0.6, help="share of this machine's memory for Feast")
    parser.add_argument("--skip", action="append", choices=["feast"], default=[])
    given = parser.parse_args(arguments)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * given.feast_memory
    sizes = tuple(Size.parse(each) for each in given.size or SIZES)
    plan = Plan(sizes, given.runs, Limits(given.feast_seconds, memory))
    folder = Path(tempfile.mkdtemp(prefix="hs-bench-"))
    outcomes: list[tuple[Size, Outcome]] = []
    try:
        settings = Settings(home=folder / "home", ray=RaySettings(object_store_bytes=_OBJECT_STORE_BYTES))
        with cluster.connect(settings):
            ray.data.DataContext.get_current().enable_progress_bars = False
            for number, size in enumerate(sizes):
                place = Place(folder / str(number))
                outcomes.append((size, run(place, size, plan, given.skip)))
                shutil.rmtree(place.folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = report(plan, outcomes)
    print(found.markdown())
    if not given.size and not given.skip:
        print(f"written to {found.write('feast_join').relative_to(ROOT)}")
    return 1 if any(outcome.differences for _, outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
