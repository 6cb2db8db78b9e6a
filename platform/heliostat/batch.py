"""Batch prediction: every entity as of an instant, scored by one version, one Ray task a bucket.

A task reads its bucket's events, computes the features with the kernel that training used, scores
them, and writes a Delta file that nobody sees before the driver's one commit. So a run that dies
half-way leaves nothing to read, and a repeated run for the same instant replaces its rows.

Predictions at or above a threshold are also cached in the online store, by entity key, for a
while: each says which version made it and of which instant it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from deltalake.transaction import AddAction

from heliostat.clock import US_PER_S, format_instant, parse_duration_us
from heliostat.errors import InvalidValueError
from heliostat.features.bucket_tasks import over_buckets
from heliostat.features.definitions import request_types
from heliostat.models.definitions import ModelSpec
from heliostat.models.packaging import LoadedModel, ModelPackage
from heliostat.models.registry import PRODUCTION, Selector
from heliostat.models.rows import ModelRows, key_schema, version_features
from heliostat.models.spine import AS_OF, ModelSpine
from heliostat.schema import TIMESTAMP
from heliostat.storage.offline_store import OfflineStore
from heliostat.storage.online_store import OnlineConfig, OnlineStore
from heliostat.workspace import Workspace

VERSION = "model_version"
SCORE = "score"


@dataclass(frozen=True)
class BatchReport:
    """What a batch prediction did.

    Attributes:
        model: The model's name.
        version: The version that scored.
        as_of_us: The instant that the features are of.
        entities: Entities scored.
        mean_score: Of all of them; NaN without any.
        cached: Predictions that were put into the online store.
        table_version: Version of the Delta table that holds the rows; -1 if there never were any.
        log_versions: Version of each source's event log that was read.
        seconds: How long it took.
    """

    model: str
    version: int
    as_of_us: int
    entities: int
    mean_score: float
    cached: int
    table_version: int
    log_versions: Mapping[str, int]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        document = {**asdict(self), "as_of": format_instant(self.as_of_us), "seconds": round(self.seconds, 3)}
        del document["as_of_us"]
        return {**document, "mean_score": None if math.isnan(self.mean_score) else self.mean_score}

    def __str__(self) -> str:
        mean = f", mean score {self.mean_score:.4f}" if self.entities else ""
        return (
            f"{self.model} version {self.version} scored {self.entities:,} entities as of "
            f"{format_instant(self.as_of_us)} in {self.seconds:.1f} s{mean}; {self.cached:,} cached for look-up"
        )


def output_schema(spec: ModelSpec) -> pa.Schema:
    """Key columns, ``as_of``, ``model_version`` and ``score``."""
    return pa.schema([*key_schema(spec.entity), (AS_OF, TIMESTAMP), (VERSION, pa.int64()), (SCORE, pa.float64())])


@dataclass(frozen=True)
class CacheRule:
    """Which predictions are kept for look-up by key.

    Attributes:
        above: Those at or above this score.
        ttl_s: For how long.
        online: Where.
    """

    above: float
    ttl_s: float
    online: OnlineConfig


@dataclass(frozen=True, eq=False)
class BucketScorer:
    """Scores one bucket of entities; picklable.

    Attributes:
        rows: Reads the bucket's rows, without labels.
        names: The columns of the rows that make the version's matrix, in the order of its signature.
        version: The version's number.
        package: Its files.
        offline: Where results are written.
        cache: Which of them are cached; None: none.
    """

    rows: ModelRows
    names: tuple[str, ...]
    version: int
    package: ModelPackage
    offline: OfflineStore
    cache: CacheRule | None

    @cached_property
    def model(self) -> LoadedModel:
        """The version, loaded once a process and task."""
        return self.package.load()

    def score(self, bucket: int) -> pa.Table:
        """The predictions of one bucket, columns of `output_schema`."""
        rows, spec = self.rows.table(bucket), self.rows.spec
        matrix = np.column_stack([rows.column(name).to_numpy() for name in self.names])
        scores = self.model.predict(np.ascontiguousarray(matrix), names=self.package.signature.names)
        versions = np.full(len(scores), self.version, dtype=np.int64)
        kept = [rows.column(column) for column in (*spec.entity.key_columns, AS_OF)]
        return pa.table([*kept, versions, scores], schema=output_schema(spec))

    def run(self, bucket: int) -> pa.Table:
        """Score, write and cache one bucket; returns one row that says what was done."""
        found = self.score(bucket)
        instant_us = self.rows.instants_us[0]
        name = self.rows.spec.name
        written = self.offline.write_batch_part(name, instant_us, found) if found.num_rows else None
        scores = found.column(SCORE).to_numpy()
        done = {
            "entities": found.num_rows,
            "total": float(scores.sum()),
            "cached": self._cached(found),
            "part": b"" if written is None else orjson.dumps(asdict(written)),
        }
        return pa.Table.from_pylist([done], schema=_DONE)

    def _cached(self, found: pa.Table) -> int:
        if self.cache is None:
            return 0
        documents = _documents(self.rows.spec, found, self.rows.instants_us[0], self.cache)
        if documents:
            with OnlineStore(self.cache.online) as store:
                store.put_many(documents, ttl_s=self.cache.ttl_s)
        return len(documents)


def _documents(spec: ModelSpec, found: pa.Table, instant_us: int, cache: CacheRule) -> dict[str, bytes]:
    """What is kept for look-up of some predictions, by key."""
    chosen = found.filter(pa.array(found.column(SCORE).to_numpy() >= cache.above))
    texts = spec.entity.encode(chosen, what="predictions").cast(pa.string()).to_pylist()
    shared = {"model": spec.name, "as_of": format_instant(instant_us)}
    rows = zip(texts, chosen.column(SCORE).to_pylist(), chosen.column(VERSION).to_pylist(), strict=True)
    return {
        cache.online.keys.batch(spec.name, text): orjson.dumps(
            {"entity": text, "score": score, "version": version, **shared}
        )
        for text, score, version in rows
    }


def restore_cache(workspace: Workspace, spec: ModelSpec) -> int:
    """Cache the latest batch prediction again, by the settings' rule, for what is left of its time.

    Args:
        workspace: Offline and online store, clock and settings.
        spec: The model.

    Returns:
        How many predictions; 0 if there is no batch, or its time is over.

    Raises:
        StorageError: If a store can't be reached.
    """
    above, instants = workspace.settings.batch.cache_above, workspace.offline_store.batches(spec.name)
    if above is None or not instants:
        return 0
    age_us = workspace.clock.now_us() - instants[-1]
    left_s = (parse_duration_us(workspace.settings.batch.cache_ttl) - age_us) / US_PER_S
    if left_s <= 0:
        return 0
    found = workspace.offline_store.read_batch(spec.name, instants[-1])
    documents = _documents(spec, found, instants[-1], CacheRule(above, left_s, workspace.online_config))
    workspace.online.put_many(documents, ttl_s=left_s)
    return len(documents)


_DONE = pa.schema([("entities", pa.int64()), ("total", pa.float64()), ("cached", pa.int64()), ("part", pa.binary())])


def predict_all(
    workspace: Workspace,
    spec: ModelSpec,
    *,
    version: Selector = PRODUCTION,
    as_of_us: int | None = None,
    cache_above: float | None = None,
    cache_ttl_s: float | None = None,
    inputs: pa.Table | None = None,
) -> BatchReport:
    """Predict for a model's whole population as of an instant. Ray must be connected.

    A model that takes inputs of the request can't be asked about a population: nobody has brought any.
    For it, ``inputs`` says whom to predict for, and with what.

    Doing it again for the same instant replaces what was there: the same version and events give the
    same rows.

    Args:
        workspace: Log, registry, stores, clock and settings.
        spec: The model.
        version: A number or an alias.
        as_of_us: The instant; by default now. Events at or after it aren't known.
        cache_above: Cache predictions at or above this; None: none.
        cache_ttl_s: For how long; by default the settings'.
        inputs: Key columns and the model's inputs, a row for each prediction; None: the population.

    Raises:
        MissingInputError: If the model takes inputs of the request and none are given.
        SpineError: If ``inputs`` lacks a column, or has one of the wrong type.
        NotFoundError: If there is no such version.
        StaleVersionError: If it was trained on features that are declared otherwise now.
        InvalidValueError: If the instant is in the future.
        StorageError: If a store can't be reached.
    """
    begin = time.perf_counter()
    scorer = scorer_of(
        workspace,
        spec,
        version=version,
        as_of_us=as_of_us,
        cache_above=cache_above,
        cache_ttl_s=cache_ttl_s,
        inputs=inputs,
    )
    done = pa.concat_tables(over_buckets(scorer.run, scorer.rows.event_log.n_buckets)).to_pylist()
    instant_us = scorer.rows.instants_us[0]
    parts = [AddAction(**orjson.loads(each["part"])) for each in done if each["part"]]
    entities = sum(int(each["entities"]) for each in done)
    return BatchReport(
        model=spec.name,
        version=scorer.version,
        as_of_us=instant_us,
        entities=entities,
        mean_score=math.fsum(float(each["total"]) for each in done) / entities if entities else float("nan"),
        cached=sum(int(each["cached"]) for each in done),
        table_version=scorer.offline.commit_batch(spec.name, instant_us, parts),
        log_versions=scorer.rows.log_versions,
        seconds=time.perf_counter() - begin,
    )


def scorer_of(
    workspace: Workspace,
    spec: ModelSpec,
    *,
    version: Selector = PRODUCTION,
    as_of_us: int | None = None,
    cache_above: float | None = None,
    cache_ttl_s: float | None = None,
    inputs: pa.Table | None = None,
) -> BucketScorer:
    """All that the buckets' tasks need; arguments and errors as `predict_all`."""
    now_us = workspace.clock.now_us()
    if as_of_us is not None and as_of_us > now_us:
        raise InvalidValueError("as-of instant", format_instant(as_of_us), f"one up to now, {format_instant(now_us)}")
    registered = workspace.models.get(spec.name, version)
    features = version_features(registered, workspace.definitions.views, spec)
    instant_us, log, spine = now_us if as_of_us is None else as_of_us, workspace.event_log, None
    if inputs is not None:
        instants = pa.array(np.full(inputs.num_rows, instant_us), pa.int64()).cast(TIMESTAMP)
        kept = inputs.drop_columns([AS_OF]) if AS_OF in inputs.column_names else inputs
        spine = ModelSpine.of(kept.append_column(AS_OF, instants), spec, log.n_buckets, also=request_types(features))
    rows = ModelRows.of(spec, log, [instant_us], labelled=False, extra=features, spine=spine)
    cache = None
    if cache_above is not None:
        default_s = parse_duration_us(workspace.settings.batch.cache_ttl) / US_PER_S
        ttl_s = default_s if cache_ttl_s is None else cache_ttl_s
        cache = CacheRule(cache_above, ttl_s, OnlineConfig.of(workspace.settings))
    package = workspace.models.package(spec.name, registered.version)
    names = tuple(ref.name for ref in features)
    return BucketScorer(rows, names, registered.version, package, workspace.offline_store, cache)
