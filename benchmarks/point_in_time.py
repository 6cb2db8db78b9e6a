r"""The point-in-time join, side by side with DuckDB's range join and Ray Data's own group-by.

    python benchmarks/point_in_time.py
    python benchmarks/point_in_time.py --events 200000 --rows 20000 --runs 1 --skip duckdb
    python benchmarks/point_in_time.py --events 100000000 --rows 10000000 --users 1000000 --buckets 128 \
        --runs 3 --skip duckdb --skip ray-data

All contenders answer the same question: for each row (user, instant) of a spine, five features
of the user's 30 days before the instant. Each starts from files in the layout it likes best and ends
with a Parquet file; the answers are compared on all rows before a ratio is printed. A second log, in
which one user has a tenth of all events, shows what a busy entity costs.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from numpy.typing import NDArray

from benchmarks import activities, duckdb_join, ray_data_join
from benchmarks.peers import ROOT, Contender, Report, Turns, facts, interleaved, python_of, timed, tree_bytes
from benchmarks.programs import Program
from heliostat import cluster
from heliostat.features.point_in_time import historical_features
from heliostat.settings import RaySettings, Settings
from heliostat.storage.event_log import EventLog

OURS, BUSY, RAY_DATA = "Heliostat", "Heliostat, one busy user", "Ray Data"
DUCKDB, DUCKDB_BEST, DUCKDB_SORTED = "DuckDB, range join", "DuckDB, quickest", "DuckDB, quickest, sorted"
DUCKDB_REQUIREMENTS = ("duckdb>=1.5",)
TARGETS = {DUCKDB: 0.3, RAY_DATA: 0.1}
MOST_BUSY_RATIO = 1.5
FULL_EVENTS = 10_000_000
LARGE_EVENTS = 100_000_000

FEATURES = ("activity_count", "avg_session_duration", "days_since_last", "active_days", "activity_score")
EXACT = frozenset({"activity_count", "active_days"})
TOLERANCE = 1e-9
_CORES = os.cpu_count() or 1
_WARM_UPS = 3
_SLOW_RUNS = 2
_OBJECT_STORE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        events: Number of events.
        rows: Number of spine rows.
        users: Number of users.
        runs: Timed runs of each contender; Ray Data's path gets at most two.
        seed: Of the generator.
        buckets: The event log's.
        partitions: Of Ray Data's shuffle.
        busiest: The share of one user's events in the second log; 0: there is none.
    """

    events: int
    rows: int
    users: int
    runs: int
    seed: int
    buckets: int
    partitions: int
    busiest: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where a run's files are: in a temporary folder."""

    folder: Path

    @property
    def events(self) -> Path:
        """The events as one Parquet file, in order of time."""
        return self.folder / "events.parquet"

    @property
    def sorted_events(self) -> Path:
        """The same in order of user and time."""
        return self.folder / "events-by-user.parquet"

    @property
    def spine(self) -> Path:
        """The spine as one Parquet file: row, user, instant."""
        return self.folder / "spine.parquet"

    def result(self, contender: str) -> Path:
        """Where a contender writes its answer: a file, or a folder of files."""
        return self.folder / f"result of {contender}.parquet"

    def event_log(self, buckets: int, *, busy: bool = False) -> EventLog:
        """The events as Heliostat keeps them; those with a busy user apart."""
        return EventLog(str(self.folder / ("busy log" if busy else "log")), n_buckets=buckets)


# ── Data at rest ────────────────────────────────────────────────────────────────────


def prepare(place: Place, plan: Plan, *, peers: bool = True) -> dict[str, float]:
    """Generate the events and the spine, and put them to rest for everybody.

    Args:
        place: Where.
        plan: How many.
        peers: Whether anybody but Heliostat wants the events.

    Returns:
        Seconds: ``"parquet"``, writing the events for the peers; ``"event log"``, appending them to ours,
        which includes their validation, deduplication and shuffle.
    """
    spine = activities.spine(plan.rows, plan.users, plan.seed)
    pq.write_table(spine.add_column(0, "row", pa.array(np.arange(plan.rows))), place.spine)
    seconds = {"parquet": 0.0, "event log": 0.0}
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(pq.ParquetWriter(place.events, activities.EVENT_SCHEMA, compression="zstd"))
        log = place.event_log(plan.buckets)
        bulk = stack.enter_context(log.bulk(activities.user_activities, ingested_us=activities.START_US))
        for batch in activities.event_batches(plan.events, plan.users, plan.seed):
            if peers:
                seconds["parquet"] += timed(partial(file.write_table, batch))
            seconds["event log"] += timed(partial(bulk.add, batch))
        seconds["event log"] += timed(bulk.commit)
    if plan.busiest:
        log = place.event_log(plan.buckets, busy=True)
        with log.bulk(activities.user_activities, ingested_us=activities.START_US) as bulk:
            for batch in activities.event_batches(plan.events, plan.users, plan.seed, busiest=plan.busiest):
                bulk.add(batch)
            bulk.commit()
    return seconds


# ── Heliostat ───────────────────────────────────────────────────────────────────────


def heliostat_join(place: Place, event_log: EventLog, name: str = OURS) -> None:
    """The spine's file -> the join -> a result file.

    Args:
        place: Where the files are.
        event_log: The events.
        name: Whose answer it is.
    """
    spine = pq.read_table(place.spine)
    view = activities.user_features
    joined = historical_features(spine, [view[name] for name in FEATURES], event_log)
    names = ["row", *FEATURES]
    result = joined.select(["row", *(view[name].name for name in FEATURES)]).rename_columns(names)
    pq.write_table(result, place.result(name), use_dictionary=False)  # floats that rarely repeat


# ── DuckDB ──────────────────────────────────────────────────────────────────────────


class DuckDBPeer(Program):
    """A DuckDB process that answers queries one after the other."""

    @classmethod
    def ready(cls) -> contextlib.AbstractContextManager[DuckDBPeer]:
        """Start the process, in DuckDB's own environment; ended with the block."""
        python = python_of("duckdb", DUCKDB_REQUIREMENTS)
        return cls.started(python, "duckdb_join.py", f"--threads={_CORES}", name="DuckDB")

    def seconds(self, query: str, place: Place, *, events: Path, out: Path) -> float:
        """Run a formulation.

        Args:
            query: Its name in `duckdb_join.QUERIES`, or ``sort``.
            place: Has the spine.
            events: Parquet file.
            out: Parquet file.

        Returns:
            How long it took, as DuckDB's process saw it.
        """
        return float(self.ask(query=query, spine=str(place.spine), events=str(events), out=str(out))["seconds"])


@dataclass(frozen=True)
class Query:
    """What DuckDB is asked: a formulation by its name, of a file of events."""

    name: str
    events: Path


def try_queries(peer: DuckDBPeer, place: Place, events: Path) -> dict[str, float]:
    """What each formulation takes from one layout of the events, seconds by name: the better of two runs."""
    out = place.result("a trial")
    found = {}
    for query in duckdb_join.QUERIES:
        found[query] = min(peer.seconds(query, place, events=events, out=out) for _ in range(2))
        print(f"  DuckDB, {events.stem}: {query}, {found[query]:.2f} s", flush=True)
    return found


# ── Side by side ────────────────────────────────────────────────────────────────────


def disagreements(place: Place, contenders: Sequence[str]) -> list[str]:
    """Compare all answers with the first contender's, on all rows.

    Counts must be equal, floats within `TOLERANCE` of each other; null is null.

    Args:
        place: Where the answers are.
        contenders: At least one.

    Returns:
        What differs, in words; nothing if nothing does.
    """
    first, *others = (_answer(place, name) for name in contenders)
    found = []
    for name, answer in zip(contenders[1:], others, strict=True):
        for feature in ("row", *FEATURES):
            ours, theirs = first[feature], answer[feature]
            if len(ours) != len(theirs):
                found.append(f"{name} has {len(theirs):,} rows, {contenders[0]} has {len(ours):,}")
                break
            bound = 0.0 if feature in EXACT or feature == "row" else TOLERANCE
            same = np.isclose(ours, theirs, rtol=bound, atol=0.0, equal_nan=True)
            if not same.all():
                at = int(np.flatnonzero(~same)[0])
                found.append(
                    f"{name}'s {feature} differs in {int((~same).sum()):,} rows; in row {at}: "
                    f"{theirs[at]!r}, {contenders[0]} has {ours[at]!r}"
                )
    return found


def _answer(place: Place, contender: str) -> dict[str, NDArray[np.float64]]:
    table = pq.read_table(place.result(contender)).sort_by("row")
    return {name: table.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False) for name in ("row", *FEATURES)}


@dataclass
class Outcome:
    """What a run found.

    Attributes:
        turns: What each contender needed, by name.
        layouts: Seconds that putting the events to rest took, by layout.
        tried: Seconds of DuckDB's formulations by name, by layout.
        queries: What DuckDB is asked, by contender.
        idle_bytes: What Ray held before any work.
        differences: Where answers differ, in words.
        duckdb: DuckDB's version.
    """

    turns: dict[str, Turns] = field(default_factory=dict)
    layouts: dict[str, float] = field(default_factory=dict)
    tried: dict[str, dict[str, float]] = field(default_factory=dict)
    queries: dict[str, Query] = field(default_factory=dict)
    idle_bytes: int = 0
    differences: list[str] = field(default_factory=list)
    duckdb: str = "skipped"


def run(plan: Plan, place: Place, skip: Sequence[str] = ()) -> Outcome:
    """All contenders, in turns.

    Args:
        plan: How much.
        place: An empty folder.
        skip: ``duckdb``, ``ray-data``.
    """
    outcome = Outcome()
    print(f"{plan.events:,} events of {plan.users:,} users, {plan.rows:,} rows: putting them to rest …", flush=True)
    # In a process of its own, so that its memory isn't counted as anybody's.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as aside:
        outcome.layouts = aside.submit(prepare, place, plan, peers=set(skip) != {"duckdb", "ray-data"}).result()
    log = place.event_log(plan.buckets)
    with contextlib.ExitStack() as stack:
        peers: dict[str, DuckDBPeer] = {}
        if "duckdb" not in skip:
            choose_queries(outcome, place)
            # A process each, whose memory is that of its query alone.
            peers = {name: stack.enter_context(DuckDBPeer.ready()) for name in outcome.queries}
        apart = tuple(peer.pid for peer in peers.values())
        settings = Settings(home=place.folder, ray=RaySettings(object_store_bytes=_OBJECT_STORE_BYTES))
        stack.enter_context(cluster.connect(settings))
        ray.data.DataContext.get_current().enable_progress_bars = False
        outcome.idle_bytes = tree_bytes(without=apart)
        print("in turns:", flush=True)
        warm_ups = 1 if plan.events >= LARGE_EVENTS else _WARM_UPS
        logs = {OURS: log, BUSY: place.event_log(plan.buckets, busy=True)}
        ours = {
            name: Contender(
                partial(timed, partial(heliostat_join, place, each, name)), plan.runs, warm_ups, without=apart
            )
            for name, each in logs.items()
            if name == OURS or plan.busiest
        }
        duckdb = {
            name: Contender(_asking(peer, place, outcome.queries[name], name), plan.runs, _WARM_UPS, peer.pid)
            for name, peer in peers.items()
        }
        outcome.turns = interleaved({**ours, **duckdb})
        if "ray-data" not in skip:
            # Last: its shuffle leaves Ray with other, cold processes.
            work = partial(ray_data_join.join, place.events, place.spine, place.result(RAY_DATA), plan.partitions)
            contender = Contender(lambda: timed(work), min(plan.runs, _SLOW_RUNS), without=apart)
            outcome.turns |= interleaved({RAY_DATA: contender})
    outcome.differences = disagreements(place, [name for name in outcome.turns if name != BUSY])
    return outcome


def choose_queries(outcome: Outcome, place: Place) -> None:
    """Find what DuckDB answers quickest here; adds what was tried and what takes part.

    Args:
        outcome: Gets it.
        place: Has the events; gets them sorted by user too.
    """
    with DuckDBPeer.ready() as peer:
        outcome.duckdb = str(peer.greeting["version"])
        outcome.layouts["sorted"] = peer.seconds("sort", place, events=place.events, out=place.sorted_events)
        in_time, by_user = (try_queries(peer, place, file) for file in (place.events, place.sorted_events))
    outcome.tried = {"in order of time": in_time, "sorted by user": by_user}
    outcome.queries = {
        DUCKDB: Query("range join", place.events),
        DUCKDB_BEST: Query(min(in_time, key=in_time.__getitem__), place.events),
        DUCKDB_SORTED: Query(min(by_user, key=by_user.__getitem__), place.sorted_events),
    }


def _asking(peer: DuckDBPeer, place: Place, query: Query, name: str) -> Callable[[], float]:
    return lambda: peer.seconds(query.name, place, events=query.events, out=place.result(name))


def report(plan: Plan, outcome: Outcome) -> Report:
    """The table, and what a reader must know of it."""
    ours = outcome.turns[OURS].median_s
    rests = {
        OURS: "event log, bucketed by user",
        BUSY: "event log, bucketed by user",
        DUCKDB_SORTED: "Parquet, sorted by user",
    }
    rows: list[list[object]] = []
    for name, turns in outcome.turns.items():
        ratio: object = "1" if name == OURS else ours / turns.median_s
        target = f"≤ {TARGETS[name]}" if name in TARGETS else ""
        if name == BUSY:
            ratio, target = turns.median_s / ours, f"≤ {MOST_BUSY_RATIO}"
        rows.append(
            [
                name,
                rests.get(name, "Parquet, in order of time"),
                turns.median_s,
                turns.median_s / plan.events * 1e9,
                ratio,
                target,
                turns.peak_bytes / 2**30,
            ]
        )
    idle = f"{outcome.idle_bytes / 2**30:.2f}"
    sorting = outcome.layouts.get("sorted")
    at_rest = (
        f"appending to the event log (validation, deduplication, shuffle) {outcome.layouts['event log']:.1f} s",
        f"writing Parquet in order of time {outcome.layouts['parquet']:.1f} s",
        *([] if sorting is None else [f"DuckDB sorting it by user {sorting:.1f} s"]),
    )
    notes = [
        "Timed, warm: from events and spine at rest on disk to a Parquet file with the features.",
        f"Medians of {plan.runs} runs in turns, warmed up; Ray Data's path last, {min(plan.runs, _SLOW_RUNS)} runs.",
        "Ratio: Heliostat's time over the contender's. The target's range join is the one that one first writes.",
        f"Peak memory: of all its processes together, shared pages counted once; Ray alone, idle, holds {idle} GiB.",
        f"Once, before: {'; '.join(at_rest)}.",
        "Window: 30 days, rounded down to the day at its lower edge, for all.",
    ]
    if BUSY in outcome.turns:
        notes.append(f"One busy user has {plan.busiest:.0%} of all events; the ratio is to the log without.")
    for layout, tried in outcome.tried.items():
        told = ", ".join(f"{query} {seconds:.1f} s" for query, seconds in tried.items())
        notes.append(f"DuckDB's formulations, events {layout}: {told}.")
    notes += [f"{name}: “{query.name}”." for name, query in outcome.queries.items() if name != DUCKDB]
    same = f"counts exactly, floats to {TOLERANCE:g}"
    notes.append(
        f"Answers DIFFER: {'; '.join(outcome.differences)}."
        if outcome.differences
        else f"All answers agree on all {plan.rows:,} rows: {same}."
    )
    return Report(
        title=f"Point-in-time join: {plan.events:,} events × {plan.rows:,} spine rows",
        columns=("contender", "events at rest", "seconds", "ns an event", "ratio", "target", "peak GiB"),
        rows=rows,
        notes=notes,
        facts=facts("ray", "pyarrow", "numpy", duckdb=outcome.duckdb, users=plan.users, buckets=plan.buckets),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program.

    Returns:
        1 if the answers differ, otherwise 0, whoever was quicker.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=FULL_EVENTS)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the spine")
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5, help="timed ones of each contender")
    parser.add_argument("--seed", type=int, default=0, help="of the generator")
    parser.add_argument("--buckets", type=int, default=16, help="of the event log")
    parser.add_argument("--partitions", type=int, default=4, help="of Ray Data's shuffle")
    parser.add_argument(
        "--busiest", type=float, default=0.1, help="share of one user's events, in a second log; or 0"
    )
    parser.add_argument("--skip", action="append", choices=["duckdb", "ray-data"], default=[])
    given = vars(parser.parse_args(arguments))
    skip = given.pop("skip")
    plan = Plan(**given)
    folder = Path(tempfile.mkdtemp(prefix="hs-bench-"))
    try:
        outcome = run(plan, Place(folder), skip)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = report(plan, outcome)
    print(found.markdown())
    name = "point_in_time" if FULL_EVENTS <= plan.events < LARGE_EVENTS and not skip else ""
    if plan.events >= LARGE_EVENTS:
        name = "point_in_time_large"
    if name:
        print(f"written to {found.write(name).relative_to(ROOT)}")
    return 1 if outcome.differences else 0


if __name__ == "__main__":
    sys.exit(main())
