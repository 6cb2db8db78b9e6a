"""History brought into the online store, side by side with Feast's `materialize` on the same server.

    python benchmarks/materialization.py            # minutes; writes benchmarks/results/materialization.{md,json}
    python benchmarks/materialization.py --users 300 --events 3000 --runs 1 --skip feast

Heliostat reads raw activities from its event log, adds them up to daily tiles and writes an entity's
ring: ten features over windows of 14 and 30 days that go on sliding. Feast reads a file with the ten
values as of now, one row an entity, and writes them. The server is emptied before each run.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import redis

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import activities
from benchmarks.online_read import FEAST_REQUIREMENTS, N_BUCKETS, NOW_US, TOLERANCE
from benchmarks.peers import ROOT, Contender, Report, Turns, facts, interleaved, python_of
from benchmarks.programs import Program, valkey_server
from heliostat import cluster
from heliostat.features.offline import compute_features
from heliostat.online.materialize import SMALL_MATERIALIZATION, materialize
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.schema import TIMESTAMP
from heliostat.settings import IngestionSettings, RaySettings, Settings
from heliostat.storage.event_log import EventLog
from heliostat.storage.online_store import OnlineConfig, OnlineStore

FEAST, ON_RAY, ALONE = "Feast, materialize", "Heliostat on Ray", "Heliostat, one process"
TASKS = "Heliostat, Ray's tasks"
TARGET = 10.0
VIEW = activities.ten_features("ten")
LIMITS = RingLimits.of(IngestionSettings())
_OBJECT_STORE_BYTES = 500 * 2**20
_CHECKED = 1_000


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        users: With activities or without.
        events: Of all of them together.
        runs: Timed runs of each contender.
    """

    users: int
    events: int
    runs: int


@dataclass(frozen=True)
class Place:
    """Where a run's files and its server are; picklable.

    Attributes:
        folder: A temporary folder.
        port: The server's.
    """

    folder: Path
    port: int

    @property
    def values(self) -> Path:
        """Ten values a user, as of now: what Feast reads."""
        return self.folder / "values.parquet"

    @property
    def log(self) -> EventLog:
        """The activities."""
        return EventLog(str(self.folder / "log"), n_buckets=N_BUCKETS)

    @property
    def online(self) -> OnlineConfig:
        """The server, as Heliostat knows it."""
        return OnlineConfig(url=f"redis://127.0.0.1:{self.port}", project="bench", timeout_s=30.0)

    def emptied(self) -> None:
        """Empty the server."""
        with redis.Redis(port=self.port) as client:
            client.flushall()

    def used_bytes(self) -> int:
        """What the server's data take."""
        with redis.Redis(port=self.port) as client:
            return int(client.info("memory")["used_memory"])


def prepare(place: Place, plan: Plan) -> int:
    """Generate activities, and the values that features have of them; puts both to rest.

    Returns:
        How many users have activities.
    """
    events = activities.events(plan.events, plan.users, seed=11)
    with place.log.bulk(activities.user_activities, ingested_us=NOW_US) as bulk:
        bulk.add(events)
        bulk.commit()
    users = np.unique(events.column("user_id").to_numpy())
    found = compute_features([VIEW], events, pa.array(users), np.full(len(users), NOW_US), deduplicate=False)
    as_of = pa.array(np.full(len(users), NOW_US - 1)).cast(TIMESTAMP)
    columns = {name: pa.array(found[VIEW[name].name], from_pandas=True) for name in VIEW.feature_names}
    pq.write_table(pa.table({"user_id": users, "event_timestamp": as_of, **columns}), place.values)
    return len(users)


def heliostat_run(place: Place, *, on_ray: bool, small: int = SMALL_MATERIALIZATION) -> float:
    """Materialize into the emptied server; seconds."""
    place.emptied()
    began = time.perf_counter()
    materialize(
        [VIEW],
        event_log=place.log,
        online=place.online,
        as_of_us=NOW_US,
        limits=LIMITS,
        on_ray=on_ray,
        small=small,
    )
    return time.perf_counter() - began


def feast_run(program: Program, place: Place) -> float:
    """The same in Feast's process."""
    place.emptied()
    span = {"start": "2026-01-01T00:00:00+00:00", "end": "2027-01-01T00:00:00+00:00"}
    return float(program.ask(do="materialize", views=[VIEW.name], **span)["seconds"])


def check(place: Place, program: Program | None) -> int:
    """Refuse to compare contenders that bring different values online.

    Returns:
        How many rings Heliostat writes.

    Raises:
        SystemExit: If they do, or ours differ from those that were computed offline.
    """
    table = pq.read_table(place.values).slice(0, _CHECKED)
    ids = table.column("user_id").to_pylist()
    offline = np.column_stack([table.column(name).to_numpy(zero_copy_only=False) for name in VIEW.feature_names])
    heliostat_run(place, on_ray=False)
    reader = FeatureReader(list(VIEW), keys=place.online.keys, n_buckets=N_BUCKETS, limits=LIMITS)
    with OnlineStore(place.online) as store:
        rings = sum(len(keys) for keys in store.scan(f"{store.keys.root}:r:"))
        answers = {"Heliostat": reader.read(store, activities.user.texts(ids), as_of_us=NOW_US)[0].matrix}
    if program is not None:
        feast_run(program, place)
        names = [f"{VIEW.name}:{name}" for name in VIEW.feature_names]
        values = program.ask(do="values", features=names, ids=ids, full_names=False)["values"]
        answers["Feast"] = np.array([values[name] for name in VIEW.feature_names], dtype=np.float64).T
    for name, answer in answers.items():
        if not np.isclose(answer, offline, rtol=TOLERANCE, atol=0.0, equal_nan=True).all():
            raise SystemExit(f"{name} brings other values online than the features have")
    return rings


@dataclass
class Outcome:
    """What a run found.

    Attributes:
        turns: What each contender needed, by name.
        used_bytes: What the server's data take afterwards, by contender.
        entities: How many users have activities.
        rings: How many of them in the windows.
        version: Feast's.
    """

    turns: dict[str, Turns] = field(default_factory=dict)
    used_bytes: dict[str, int] = field(default_factory=dict)
    entities: int = 0
    rings: int = 0
    version: str = "skipped"


def run(plan: Plan, folder: Path, skip: Sequence[str]) -> Outcome:
    """All contenders, in turns."""
    outcome = Outcome()
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        place = Place(folder, stack.enter_context(valkey_server(folder / "valkey")))
        worker = stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn))
        # In processes of their own, so that their memory isn't counted as anybody's.
        with ProcessPoolExecutor(1, mp_context=spawn) as aside:
            outcome.entities = aside.submit(prepare, place, plan).result()
        print(f"{plan.events:,} events of {outcome.entities:,} users are at rest", flush=True)
        program: Program | None = None
        if "feast" not in skip:
            python = python_of("feast", FEAST_REQUIREMENTS)
            options = ["--folder", str(folder), "--redis", f"127.0.0.1:{place.port}"]
            program = stack.enter_context(Program.started(python, "feast_store.py", *options, name="Feast"))
            outcome.version = str(program.greeting["version"])
            program.ask(do="apply", views={VIEW.name: {"file": str(place.values), "features": VIEW.feature_names}})
        outcome.rings = check(place, program)
        settings = Settings(home=folder / "home", ray=RaySettings(object_store_bytes=_OBJECT_STORE_BYTES))
        stack.enter_context(cluster.connect(settings))
        ray.data.DataContext.get_current().enable_progress_bars = False
        alone = worker.submit(os.getpid).result()
        apart = (alone, *([] if program is None else [program.pid]))
        works: dict[str, Callable[[], float]] = {
            ON_RAY: partial(heliostat_run, place, on_ray=True),
            TASKS: partial(heliostat_run, place, on_ray=True, small=0),
            ALONE: lambda: worker.submit(heliostat_run, place, on_ray=False).result(),
        }
        contenders = {
            **{
                name: Contender(_measuring(works[name], name, place, outcome), plan.runs, 2, without=apart)
                for name in (ON_RAY, TASKS)
            },
            ALONE: Contender(_measuring(works[ALONE], ALONE, place, outcome), plan.runs, pid=alone),
        }
        if program is not None:
            feast = _measuring(partial(feast_run, program, place), FEAST, place, outcome)
            contenders[FEAST] = Contender(feast, plan.runs, pid=program.pid)
        outcome.turns = interleaved(contenders)
    return outcome


def _measuring(work: Callable[[], float], name: str, place: Place, outcome: Outcome) -> Callable[[], float]:
    """The work, and then a look at what the server holds."""

    def measured() -> float:
        seconds = work()
        outcome.used_bytes[name] = place.used_bytes()
        return seconds

    return measured


def report(plan: Plan, outcome: Outcome) -> Report:
    """The table, and what a reader must know of it."""
    theirs = outcome.turns.get(FEAST)
    rows: list[list[object]] = []
    for name, turns in outcome.turns.items():
        target = f"≥ {TARGET:g}" if name in (ON_RAY, ALONE) else ""
        each = (outcome.entities if name == FEAST else outcome.rings) / turns.median_s
        ratio: object = ""
        if theirs is not None:
            ratio = "1" if name == FEAST else each / (outcome.entities / theirs.median_s)
        used = outcome.used_bytes[name] / 2**20
        rows.append([name, turns.median_s, each, ratio, target, turns.peak_bytes / 2**30, used])
    return Report(
        title=f"Materialization: ten features of {outcome.entities:,} entities",
        columns=("contender", "seconds", "entity rows/s", "of Feast's", "target", "peak GiB", "server MiB"),
        rows=rows,
        notes=(
            f"Heliostat: {plan.events:,} raw activities from the event log -> daily tiles of 30 days, ten features.",
            "Feast: a Parquet file with ten values an entity, computed beforehand; that isn't timed.",
            f"{outcome.rings:,} users have activities in the windows, and a ring; Feast writes a row for others too.",
            "Entity rows: what each wrote; Heliostat's are rings.",
            "Same server over TCP, with its append-only file, emptied before each run, so all is written.",
            "Heliostat, one process: where no Ray is connected. Heliostat on Ray: where one is.",
            f"Up to {SMALL_MATERIALIZATION:,} events it works the same way; Ray's tasks: were it to use them.",
            f"Medians of {plan.runs} runs in turns, warmed up.",
            "Peak memory: of all of a contender's processes together; Ray, idle, holds most of a GiB.",
            "Server: the memory of its data afterwards. Rings hold the past that windows slide over.",
            f"Both brought the values online that the features have offline, to {TOLERANCE:g}, for 1,000 users.",
        ),
        facts=facts(
            "ray", "redis", "hiredis", feast=outcome.version, users=plan.users, events=plan.events, buckets=N_BUCKETS
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=5, help="timed ones of each contender")
    parser.add_argument("--skip", action="append", choices=["feast"], default=[])
    given = vars(parser.parse_args(arguments))
    skip = given.pop("skip")
    plan = Plan(**given)
    folder = Path(tempfile.mkdtemp(prefix="hs-bench-"))
    try:
        outcome = run(plan, folder, skip)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = report(plan, outcome)
    print(found.markdown())
    if not skip and plan.users >= parser.get_default("users"):
        print(f"written to {found.write('materialization').relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
