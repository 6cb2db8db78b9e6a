"""Small real parts that serving tests are put together from: no mocks, no network."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cache

import lightgbm as lgb
import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.clock import US_PER_DAY, ManualClock, parse_instant_us
from heliostat.errors import OnlineStoreUnavailableError, UnknownVersionError
from heliostat.experiments.assignment import RoutingDocument, Variant
from heliostat.features.aggregations import Count, Mean, Sum
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.models.definitions import Definitions, Label, ModelSpec
from heliostat.models.packaging import LoadedModel, ModelPackage, Signature
from heliostat.online.tiles import RingLimits
from heliostat.schema import TIMESTAMP
from heliostat.serving.breaker import BreakerRule, Breakers, guarded
from heliostat.serving.fallback import BatchCache, VersionLadder
from heliostat.serving.lookup import FeatureLookup, FeatureReaders
from heliostat.serving.prediction_log import PredictionLog
from heliostat.serving.predictor import STORE, Predictor, Stages
from heliostat.serving.requests import PredictRequest
from heliostat.serving.routing import ABRouter
from heliostat.serving.scoring import ModelRunner
from heliostat.serving.telemetry import Meter
from heliostat.serving.version_book import VersionBook, VersionFacts
from heliostat.storage.online_store import OnlineKeys
from heliostat.storage.stream_entries import rows_from
from heliostat.storage.streams import CheckedRecord
from tests import rings

NOW_US = parse_instant_us("2026-03-01T12:00:00Z")
KEYS = OnlineKeys("hs", "test")
N_BUCKETS = 4
LIMITS = RingLimits(lateness_us=US_PER_DAY, future_tolerance_us=60_000_000)

USER = Entity("user", keys={"user_id": "int64"})
ACTIVITIES = EventSource(
    "activities",
    schema=pa.schema(
        {"event_id": pa.int64(), "user_id": pa.int64(), "at": TIMESTAMP, "amount": pa.float64()},
    ),
    entity=USER,
    event_time="at",
    event_id="event_id",
)
USAGE = FeatureView(
    "usage",
    version=1,
    source=ACTIVITIES,
    features={"count_30d": Count(window="30d"), "amount_30d": Sum("amount", window="30d"), "mean": Mean("amount")},
)


@USAGE.derived
def twice(count_30d: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2 * count_30d


CHURN = ModelSpec("churn", entity=USER, features=[USAGE], label=Label.none_within("churned", ACTIVITIES, "30d"))
UPSELL = ModelSpec("upsell", entity=USER, features=[USAGE], label=Label.none_within("upsold", ACTIVITIES, "30d"))
DEFINITIONS = Definitions.of([CHURN])
BOTH = Definitions.of([CHURN, UPSELL])
NAMES = CHURN.feature_names
MODELS = {"churn": CHURN}


class OnlineMemory:
    """The online store's reads, from a dictionary; can be taken down, and slowed until it is let."""

    def __init__(self, values: dict[str, bytes] | None = None) -> None:
        self.values = dict(values or {})
        self.reads: list[int] = []
        self.down = False
        self.gate: asyncio.Event | None = None

    async def read(self, keys: Sequence[str]) -> list[bytes | None]:
        self.reads.append(len(keys))
        if self.gate is not None:
            await self.gate.wait()
        if self.down:
            raise OnlineStoreUnavailableError("redis://test", "connection refused")
        return [self.values.get(key) for key in keys]

    def publish(self, document: RoutingDocument) -> None:
        self.values[KEYS.route(document.model)] = document.to_bytes()


def events(*rows: tuple[int, float, float]) -> pa.Table:
    """Events of (user, days before now, amount)."""
    users, days, amounts = (list(column) for column in zip(*rows, strict=True))
    times = [NOW_US - int(each * US_PER_DAY) for each in days]
    return pa.table(
        {"event_id": range(len(rows)), "user_id": users, "at": pa.array(times, pa.int64()), "amount": amounts}
    ).cast(ACTIVITIES.schema)


def rings_of(table: pa.Table) -> dict[str, bytes]:
    """What the online store holds after these events, by key."""
    return rings.rings_of([USAGE], table, keys=KEYS, n_buckets=N_BUCKETS, as_of_us=NOW_US, limits=LIMITS)


@cache
def trained(seed: int = 1) -> ModelPackage:
    """A small booster whose prediction rises with the number of events, more so with a higher seed."""
    rng = np.random.default_rng(seed)
    matrix = rng.uniform(0, 10, (400, len(NAMES)))
    labels = (matrix[:, 0] * seed + rng.normal(0, 1, 400) > 5 * seed).astype(float)
    data = lgb.Dataset(matrix, labels, feature_name=list(NAMES), params={"verbosity": -1})
    parameters = {"objective": "binary", "num_leaves": 4, "verbosity": -1, "num_threads": 1, "seed": seed}
    booster = lgb.train(parameters, data, num_boost_round=3 + seed)
    return ModelPackage(booster.model_to_string(), Signature(NAMES), "binary")


class Versions:
    """Versions 1, 2 and 3 of the churn model; some can be broken."""

    def __init__(self) -> None:
        self.broken: set[int] = set()
        self.loads: list[int] = []
        self.priors: dict[int, float | None] = {1: 0.25, 2: 0.35, 3: 0.45}
        self.names: dict[int, tuple[str, ...]] = {}
        self.medians: dict[int, tuple[float, ...]] = {}
        self.stale: dict[int, tuple[str, ...]] = {}

    def load(self, model: str, version: int) -> LoadedModel:
        self.loads.append(version)
        if version in self.broken or version not in self.priors:
            raise UnknownVersionError(model, str(version), ("1", "2", "3"))
        return trained(version).load()

    def facts(self, model: str, version: int) -> VersionFacts:
        if version not in self.priors:
            raise UnknownVersionError(model, str(version), ("1", "2", "3"))
        return VersionFacts(
            self.names.get(version, NAMES),
            self.priors[version],
            self.stale.get(version, ()),
            medians=self.medians.get(version, ()),
        )


class Stream:
    """A prediction stream that remembers its records and how many came in one call; on the server of a store."""

    def __init__(self, store: OnlineMemory | None = None) -> None:
        self.store = store or OnlineMemory()
        self.records: list[bytes] = []
        self.calls: list[int] = []
        self.down = False
        self.gate: asyncio.Event | None = None

    async def append(self, records: list[bytes]) -> None:
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        if self.down:
            raise OnlineStoreUnavailableError("redis://test", "connection refused")
        self.calls.append(len(records))
        self.records.extend(records)

    async def append_while(self, checked: CheckedRecord) -> bool:
        record, held = checked
        await asyncio.sleep(0)
        holds = self.store.values.get(held.key) == held.value
        await self.append([record] if holds else [])
        return holds

    @property
    def requests(self) -> int:
        """How many requests the records are about."""
        return sum(len(orjson.loads(record.partition(b"\n")[0])["requests"]) for record in self.records)

    def entries(self, variant: str | None = None) -> list[dict[str, object]]:
        """Rows as the prediction table will have them."""
        found: list[dict[str, object]] = []
        for record in self.records:  # one after the other: a table has one model's
            ((_, rows),) = rows_from("predictions", [((1, 0), record)]).values()
            found += rows.to_pylist()
        return [entry for entry in found if variant is None or entry["variant"] == variant]


class House:
    """A predictor with everything around it."""

    def __init__(
        self, *, deadline_ms: float = 5_000.0, rule: BreakerRule | None = None, when_log_fails: str = "reject"
    ) -> None:
        self.store = OnlineMemory(rings_of(events((1, 1, 10.0), (1, 2, 20.0), (2, 3, 5.0), (3, 40, 7.0))))
        self.store.publish(RoutingDocument.single("churn", 1, revision=1))
        self.versions = Versions()
        self.stream = Stream(self.store)
        self.clock = ManualClock(NOW_US)
        self.catalog: dict[str, RoutingDocument] = {}
        self.readers = FeatureReaders(BOTH, keys=KEYS, n_buckets=N_BUCKETS, limits=LIMITS)
        self.lookup = FeatureLookup(self.store, self.readers, self.clock)  # type: ignore[arg-type] # it only reads
        self.router = ABRouter(self.catalog.get)
        self.breakers = Breakers(rule or BreakerRule())
        self.last_good: dict[str, tuple[int, ...]] = {}
        self.runner = ModelRunner(self.versions.load)
        self.meter = Meter()
        book = VersionBook(self.versions.facts)
        self.predictor = Predictor(
            Stages(
                guarded(self.lookup, self.breakers.of(STORE)),
                self.router,
                self.runner,
                ABRouter(self.catalog.get),
                self.runner.at_once,
            ),
            self.readers,
            book,
            PredictionLog(self.stream.append, self.stream.append_while, when_fails=when_log_fails),  # type: ignore[arg-type] # a literal
            self.clock,
            deadline_ms=deadline_ms,
            breakers=self.breakers,
            ladder=VersionLadder(
                book.prior,
                self.breakers,
                last_good=lambda model: self.last_good.get(model, ()),
                cached=BatchCache(guarded(self.store.read, self.breakers.of(STORE)), KEYS, self.clock),
            ),
            meter=self.meter,
        )


def request(*entity_ids: int, **overrides: float) -> PredictRequest:
    """A request; overrides are the first entity's."""
    given = {0: {f"usage__{name}": value for name, value in overrides.items()}} if overrides else {}
    return PredictRequest("churn", tuple(str(each) for each in entity_ids), entity_ids, given)


def split(revision: int, weight: float = 0.5, *, coverage: float = 1.0, challenger: int = 2) -> RoutingDocument:
    """A split of version 1 and a challenger."""
    arms = (Variant("control", 1, 1 - weight), Variant("challenger", challenger, weight))
    return RoutingDocument("churn", revision, "churn/test", coverage, arms)
