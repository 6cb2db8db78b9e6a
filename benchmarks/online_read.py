"""Feature vectors read online, side by side with Feast's SDK on the same server.

    python benchmarks/online_read.py                # two minutes; writes benchmarks/results/online_read.{md,json}
    python benchmarks/online_read.py --smoke        # seconds, without Feast, nothing written

Heliostat merges rings of daily tiles at the instant of the request: ten features over windows of 14
and 30 days that slide. Feast gets the values that these features have at that instant, computed
beforehand, and looks them up. Both give the same numbers before anything is timed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import redis

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import activities
from benchmarks.peers import ROOT, Report, facts, python_of
from benchmarks.programs import Program, valkey_server
from heliostat.clock import US_PER_DAY, ManualClock
from heliostat.features.aggregations import FloatArray
from heliostat.features.definitions import FeatureView
from heliostat.features.offline import compute_features
from heliostat.ingestion.intake import Intake
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.schema import TIMESTAMP
from heliostat.settings import IngestionSettings
from heliostat.storage.online_store import OnlineConfig, OnlineStore

FEAST_REQUIREMENTS = ("feast[redis]>=0.67",)
OURS, FEAST, FEAST_DICT = "Heliostat, rings merged", "Feast, get_online_features", "Feast, and to_dict"
OURS_OF_MORE = "Heliostat, beside two more views"
OURS_NEARBY, FEAST_NEARBY = "Heliostat, by Unix socket", "Feast, by Unix socket"
HMGET, MGET, RINGS = "floor: HMGETs, unpacked", "floor: MGET of vectors", "floor: MGET of the rings"
TARGETS = {1: 2.0, 100: 10.0}
ADDED_VIEW_TARGET = 1.3


@dataclass(frozen=True)
class Vector:
    """What is read.

    Attributes:
        views: All of their features.
    """

    views: tuple[FeatureView, ...]

    @property
    def n_features(self) -> int:
        """How many values an entity."""
        return sum(len(view.feature_names) for view in self.views)

    @property
    def feast_names(self) -> list[str]:
        """As Feast names features: ``view:feature``."""
        return [f"{view.name}:{name}" for view in self.views for name in view.feature_names]


_TEN = activities.ten_features("all_activities")
_SHARES = activities.ten_features("shares", where=pc.field("type") == "share")
_LOGINS = activities.ten_features("logins", where=pc.field("type") == "login")
_PARTS = {
    name: activities.ten_features(f"ten_{name}", part=part)
    for name, part in (
        ("1_of_2", slice(0, 5)),
        ("2_of_2", slice(5, 10)),
        ("1_of_3", slice(0, 4)),
        ("2_of_3", slice(4, 7)),
        ("3_of_3", slice(7, 10)),
    )
}
VECTORS = (
    Vector((_TEN,)),
    Vector((_PARTS["1_of_2"], _PARTS["2_of_2"])),
    Vector((_PARTS["1_of_3"], _PARTS["2_of_3"], _PARTS["3_of_3"])),
    Vector((_TEN, _SHARES)),
    Vector((_TEN, _SHARES, _LOGINS)),
)
"""The same ten features out of one, two and three views; then ten more with each view."""

VIEWS = tuple({view.name: view for vector in VECTORS for view in vector.views}.values())
NOW_US = activities.START_US + activities.DAYS * US_PER_DAY
N_BUCKETS = 16
TOLERANCE = 1e-9
_BATCHES = 64
_CHUNK = 1_000

Reads = Callable[[float], list[float]]
"""Reads for some seconds, again and again, and says how many milliseconds each read took."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        users: In the store.
        events: Of all of them together.
        entities: A read, one table row each.
        seconds: A turn.
        rounds: Turns of each reader.
    """

    users: int = 2_000
    events: int = 60_000
    entities: tuple[int, ...] = (100, 1)
    seconds: float = 1.0
    rounds: int = 5


SMOKE = Plan(users=60, events=900, entities=(5, 1), seconds=0.05, rounds=1)


@dataclass
class Latency:
    """What one reader needed, a figure a turn, in milliseconds."""

    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)

    def add(self, taken_ms: Sequence[float]) -> None:
        """Add a turn."""
        p50, p99 = np.percentile(taken_ms, (50, 99))
        self.p50.append(float(p50))
        self.p99.append(float(p99))


# ── The same data for both ──────────────────────────────────────────────────────────


def fill(store: OnlineStore, views: Sequence[FeatureView], plan: Plan) -> None:
    """The events into the views' rings, as a server takes them in."""
    table = activities.events(plan.events, plan.users, seed=7)
    source = activities.user_activities
    settings = IngestionSettings()
    clock = ManualClock(NOW_US)
    intake = Intake(store, [source], views, clock=clock, settings=settings, n_buckets=N_BUCKETS)
    times = table.column("happened_at").cast(pa.int64())
    rows = table.set_column(table.column_names.index("happened_at"), "happened_at", times).to_pylist()
    for first in range(0, len(rows), _CHUNK):
        intake.submit(source.name, rows[first : first + _CHUNK])


def write_values(plan: Plan, folder: Path) -> None:
    """The values that all views' features have then, into Feast's files."""
    table = activities.events(plan.events, plan.users, seed=7)
    users = pa.array(np.arange(plan.users))
    found = compute_features(VIEWS, table, users, np.full(plan.users, NOW_US))
    asked_at = pa.array(np.full(plan.users, NOW_US - 1)).cast(TIMESTAMP)
    for view in VIEWS:
        columns = {name: pa.array(found[view[name].name], from_pandas=True) for name in view.feature_names}
        pq.write_table(pa.table({"user_id": users, "event_timestamp": asked_at, **columns}), _file(folder, view.name))


def _file(folder: Path, view: str) -> Path:
    return folder / f"{view}.parquet"


# ── Readers ─────────────────────────────────────────────────────────────────────────


class Ours:
    """Heliostat's read.

    Args:
        store: Has the rings.
        views: All of their features.
    """

    def __init__(self, store: OnlineStore, views: Sequence[FeatureView]) -> None:
        self.store = store
        refs = [ref for view in views for ref in view]
        self.reader = FeatureReader(
            refs, keys=store.keys, n_buckets=N_BUCKETS, limits=RingLimits.of(IngestionSettings())
        )

    def read(self, ids: Sequence[int]) -> FloatArray:
        """Ids as a program has them -> the matrix of features."""
        return self.reader.read(self.store, activities.user.texts(ids), as_of_us=NOW_US)[0].matrix


@contextmanager
def feast(folder: Path, address: str) -> Iterator[Program]:
    """Feast with the views' values in the online store, while the block runs.

    Args:
        folder: With the values.
        address: Of the online store, as Feast writes it.
    """
    python = python_of("feast", FEAST_REQUIREMENTS)
    repository = Path(tempfile.mkdtemp(dir=folder))
    options = ["--folder", str(repository), "--redis", address]
    with Program.started(python, "feast_store.py", *options, name="Feast") as program:
        views = {
            view.name: {"file": str(_file(folder, view.name)), "features": list(view.feature_names)} for view in VIEWS
        }
        program.ask(do="apply", views=views)
        span = {"start": "2026-01-01T00:00:00+00:00", "end": "2027-01-01T00:00:00+00:00"}
        program.ask(do="materialize", views=list(views), **span)
        yield program


def check_agreement(program: Program, store: OnlineStore, vector: Vector, users: int) -> None:
    """Refuse to compare readers that say different things.

    Raises:
        SystemExit: If they do.
    """
    ids = list(range(min(users, 1_000)))
    ours = Ours(store, vector.views).read(ids)
    values = program.ask(do="values", features=vector.feast_names, ids=ids, full_names=True)["values"]
    names = [f"{view.name}__{name}" for view in vector.views for name in view.feature_names]
    theirs = np.array([values[name] for name in names], dtype=np.float64).T
    same = np.isclose(ours, theirs, rtol=TOLERANCE, atol=0.0, equal_nan=True)
    if not same.all():
        row, column = (int(each) for each in np.argwhere(~same)[0])
        raise SystemExit(f"{names[column]} of user {row}: {ours[row, column]!r}, Feast has {theirs[row, column]!r}")


def timing(read: Callable[[Any], object], batches: Sequence[Any]) -> Reads:
    """Reads the batches in turn."""

    def reads(seconds: float) -> list[float]:
        taken: list[float] = []
        clock, at = time.perf_counter, 0
        ends = clock() + seconds
        while (began := clock()) < ends:
            read(batches[at % len(batches)])
            taken.append((clock() - began) * 1e3)
            at += 1
        return taken

    return reads


def asking(program: Program, names: list[str], batches: Sequence[list[int]], *, to_dict: bool) -> Reads:
    """As `timing`, in Feast's process."""

    def reads(seconds: float) -> list[float]:
        answer = program.ask(do="read", features=names, batches=list(batches), seconds=seconds, to_dict=to_dict)
        return list(answer["ms"])

    return reads


def floors(client: redis.Redis, store: OnlineStore, batches: Sequence[list[int]], users: int) -> dict[str, Reads]:
    """What the protocol, the client and the server cost without a feature store; ten numbers an entity."""
    fields = [f"f{number}" for number in range(10)]
    packed = struct.Struct("<d")
    with client.pipeline(transaction=False) as pipeline:
        for user in range(users):
            pipeline.hset(f"plain:{user}", mapping=dict.fromkeys(fields, packed.pack(float(user))))
            pipeline.set(f"packed:{user}", packed.pack(float(user)) * 10)
        pipeline.execute()

    def hashes(ids: Sequence[int]) -> object:
        with client.pipeline(transaction=False) as pipeline:
            for user in ids:
                pipeline.hmget(f"plain:{user}", fields)
            return [[packed.unpack(value)[0] for value in row] for row in pipeline.execute()]

    def vectors(ids: Sequence[int]) -> object:
        return np.frombuffer(b"".join(client.mget([f"packed:{user}" for user in ids])), dtype="<f8")  # type: ignore[arg-type]

    reader = Ours(store, VECTORS[0].views).reader
    keys = [reader.keys([str(each) for each in batch]) for batch in batches]
    return {HMGET: timing(hashes, batches), MGET: timing(vectors, batches), RINGS: timing(store.read, keys)}


# ── Side by side ────────────────────────────────────────────────────────────────────

Cells = dict[tuple[int, int, str], Latency]
"""By number of entities, position in `VECTORS` and reader."""


def run(plan: Plan, folder: Path, skip: Sequence[str]) -> tuple[Cells, str]:
    """All readers, in turns.

    Args:
        plan: How much.
        folder: An empty one.
        skip: ``feast``.

    Returns:
        What each needed, and Feast's version.
    """
    with ExitStack() as stack:
        port = stack.enter_context(valkey_server(folder / "valkey"))
        # A project has the views of one vector, and no others.
        stores = [
            stack.enter_context(OnlineStore(OnlineConfig(url=f"redis://127.0.0.1:{port}", project=f"bench{at}")))
            for at in range(len(VECTORS))
        ]
        client = stack.enter_context(redis.Redis(port=port))
        unix = folder / "valkey" / "valkey.sock"
        nearby = stack.enter_context(OnlineStore(OnlineConfig(url=f"unix://{unix}", project="bench0")))
        for store, vector in zip(stores, VECTORS, strict=True):
            fill(store, vector.views, plan)
        write_values(plan, folder)
        address = f"127.0.0.1:{port}"
        program = None if "feast" in skip else stack.enter_context(feast(folder, address))
        beside = f"{address},unix_socket_path={unix}"
        near = None if "feast" in skip else stack.enter_context(feast(folder, beside))
        if program is not None:
            for store, vector in zip(stores, VECTORS, strict=True):
                check_agreement(program, store, vector, plan.users)
        cells: Cells = {}
        for entities in plan.entities:
            rng = np.random.default_rng(entities)
            batches = [rng.choice(plan.users, entities, replace=False).tolist() for _ in range(_BATCHES)]
            readers: dict[tuple[int, str], Reads] = {}
            for at, (store, vector) in enumerate(zip(stores, VECTORS, strict=True)):
                readers[at, OURS] = timing(Ours(store, vector.views).read, batches)
                if program is not None:
                    readers[at, FEAST] = asking(program, vector.feast_names, batches, to_dict=False)
                    readers[at, FEAST_DICT] = asking(program, vector.feast_names, batches, to_dict=True)
            readers[0, OURS_OF_MORE] = timing(Ours(stores[-1], VECTORS[0].views).read, batches)
            readers[0, OURS_NEARBY] = timing(Ours(nearby, VECTORS[0].views).read, batches)
            if near is not None:
                readers[0, FEAST_NEARBY] = asking(near, VECTORS[0].feast_names, batches, to_dict=False)
            readers |= {(0, name): reads for name, reads in floors(client, stores[0], batches, plan.users).items()}
            _turns(plan, entities, readers, cells)
        return cells, "skipped" if program is None else str(program.greeting["version"])


def _turns(plan: Plan, entities: int, readers: dict[tuple[int, str], Reads], cells: Cells) -> None:
    for reads in readers.values():
        reads(min(plan.seconds, 0.3))
    for _ in range(plan.rounds):
        for (at, name), reads in readers.items():
            cells.setdefault((entities, at, name), Latency()).add(reads(plan.seconds))
    for at, name in readers:
        latency, what = cells[entities, at, name], f"{entities} entities, {len(VECTORS[at].views)} views, {name}"
        told = f"p50 {statistics.median(latency.p50):.3f} ms, p99 {statistics.median(latency.p99):.3f} ms"
        print(f"  {what}: {told}", flush=True)


def report(cells: Cells, plan: Plan, version: str) -> Report:
    """The table: medians over the turns, and how many times our median each takes."""
    median = {key: (statistics.median(each.p50), statistics.median(each.p99)) for key, each in cells.items()}
    rows: list[list[object]] = []
    for (entities, at, name), (p50, p99) in median.items():
        beside = OURS_NEARBY if name in (OURS_NEARBY, FEAST_NEARBY) else OURS
        ours, vector = median[entities, at, beside], VECTORS[at]
        target = f"≥ {TARGETS[entities]:g}" if name == FEAST and at == 0 and entities in TARGETS else ""
        ratios: list[object] = ["1", "1"] if name == beside else [p50 / ours[0], p99 / ours[1]]
        # The vector with one view less: the same ten features, or ten fewer.
        before = {1: 0, 2: 1, 3: 0, 4: 3}.get(at)
        added: object = "" if before is None else p50 / median[entities, before, name][0]
        rows.append([entities, len(vector.views), vector.n_features, name, p50, p99, *ratios, target, added])
    return Report(
        title="Online read: features over sliding windows, from one to three views",
        columns=(
            *("entities", "views", "features", "reader", "p50 ms", "p99 ms", "p50 / ours", "p99 / ours", "target"),
            "p50 / with one view less",
        ),
        rows=rows,
        notes=(
            "p50 / ours, p99 / ours: how many times as long as Heliostat with as many views, reached the same way.",
            "Heliostat: from integer ids to a matrix; 31 daily tiles an entity and view are merged at the instant.",
            "Feast: from integer ids to its response; and to_dict: to the values that a program can use.",
            "Feast looks up values that were computed beforehand and materialized; they slide when that is repeated.",
            "Same server for all, over TCP unless it says otherwise, warm, one client, no concurrency, in turns.",
            "By Unix socket: the way to the server that Heliostat brings along; Feast's client takes one as well.",
            f"Medians of {plan.rounds} turns of {plan.seconds:g} s; percentiles of each turn.",
            "p50 / with one view less: what a further view costs, for the same ten features, and with ten more.",
            "Each vector has a project whose source has its views and no others.",
            f"{OURS_OF_MORE}: ten features out of one of three views that share each entity's bundle.",
            f"For the same ten features out of one more view, Heliostat's goal is ≤ {ADDED_VIEW_TARGET:g}.",
            "Floors: redis-py and hiredis alone; ten 8-byte numbers an entity, without names, types or checks.",
            f"Both gave the same numbers, to {TOLERANCE:g}, for up to 1,000 users before anything was timed.",
        ),
        facts=facts(
            *("redis", "hiredis", "numpy"), feast=version, users=plan.users, events=plan.events, buckets=N_BUCKETS
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="as small as it gets, nothing written")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of a turn")
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="turns of each reader")
    parser.add_argument("--skip", action="append", choices=["feast"], default=[])
    given = parser.parse_args(arguments)
    plan = SMOKE if given.smoke else Plan(seconds=given.seconds, rounds=given.rounds)
    skip = ["feast"] if given.smoke else given.skip
    folder = Path(tempfile.mkdtemp(prefix="hs-bench-"))
    try:
        cells, version = run(plan, folder, skip)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = report(cells, plan, version)
    print(found.markdown())
    if not given.smoke and not skip:
        print(f"written to {found.write('online_read').relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
