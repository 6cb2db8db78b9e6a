"""Which rows a model learns from: entities, instants, labels and features, split by time.

1. `split_instants` decides at which instants entities are looked at. A label needs its whole
   horizon to have passed, and no validation label may overlap training's.
2. `spine_rows` finds, in one bucket's events, who belongs to the population at each instant, and
   what became of them.
3. `build_training_set` does that for all buckets, joins the features as of each row's instant, and
   takes a fingerprint, so that a model version can say exactly what it was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.clock import US_PER_DAY, format_duration, format_instant
from heliostat.errors import TrainingDataError
from heliostat.features.aggregations import FloatArray
from heliostat.features.definitions import Entity, EventSource, content_hash
from heliostat.models.definitions import ModelSpec
from heliostat.models.labels import label_values
from heliostat.schema import TIMESTAMP, hash64, times_us

IntArray = NDArray[np.int64]

AS_OF = "as_of"
LABEL = "label"

DEFAULT_STEP_US = 30 * US_PER_DAY
DEFAULT_INSTANTS = 12


# ── Instants ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Split:
    """At which instants rows are taken, all in microseconds, ascending.

    Attributes:
        train_us: To learn from.
        validation_us: To judge by; each at least a label horizon after the last training instant.
        gap_us: Asked for, but left out: their labels would overlap validation's.
    """

    train_us: tuple[int, ...]
    validation_us: tuple[int, ...]
    gap_us: tuple[int, ...] = ()

    @property
    def all_us(self) -> tuple[int, ...]:
        """Training's, then validation's."""
        return self.train_us + self.validation_us


def split_instants(
    instants_us: Sequence[int],
    validation_us: Sequence[int] = (),
    *,
    horizon_us: int,
    now_us: int,
    first_event_us: int,
    model: str = "model",
) -> Split:
    """Split instants by time, with a gap of the label's horizon.

    Without validation instants, the last one validates and those inside the gap before it are left
    out. Without any, the latest instant whose labels are known validates, and up to twelve
    before it, 30 days apart, train.

    Args:
        instants_us: Training instants (or all of them, without validation instants).
        validation_us: Validation instants.
        horizon_us: The label's.
        now_us: The present: a label is known once its horizon has passed.
        first_event_us: Instants that are chosen here come after this.
        model: How messages name it.

    Raises:
        TrainingDataError: If labels aren't known yet, would overlap, or nothing is left.
    """
    train, validation = sorted(set(instants_us)), sorted(set(validation_us))
    horizon = format_duration(horizon_us)
    latest_us = now_us - horizon_us
    if not validation:
        validation = train[-1:] or [latest_us // US_PER_DAY * US_PER_DAY]
        train, chosen = train[:-1], not train
    else:
        chosen = not train
    if chosen:
        train = _grid(validation[0] - horizon_us, first_event_us)
    unknown = [format_instant(each) for each in (*train, *validation) if each > latest_us]
    if unknown:
        raise TrainingDataError(
            model,
            f"the labels of {', '.join(unknown)} look {horizon} ahead, and it is {format_instant(now_us)}",
            f"take instants at or before {format_instant(latest_us)}",
        )
    last_us = validation[0] - horizon_us
    gap = tuple(each for each in train if each > last_us)
    if gap and validation_us:
        raise TrainingDataError(
            model,
            f"training labels at {', '.join(map(format_instant, gap))} overlap the validation that starts at "
            f"{format_instant(validation[0])}",
            f"keep a gap of the horizon, {horizon}: train at or before {format_instant(last_us)}",
        )
    train = [each for each in train if each <= last_us]
    if not train:
        raise TrainingDataError(
            model,
            f"no training instant is left before {format_instant(last_us)}",
            f"give one at least {horizon} before the validation at {format_instant(validation[0])}, or wait for "
            f"more data (the first event is of {format_instant(first_event_us)})",
        )
    return Split(tuple(train), tuple(validation), gap)


def _grid(last_us: int, first_event_us: int) -> list[int]:
    steps = min(DEFAULT_INSTANTS, max(0, (last_us - first_event_us) // DEFAULT_STEP_US))
    return sorted(last_us - step * DEFAULT_STEP_US for step in range(int(steps)))


# ── The spine of a bucket ───────────────────────────────────────────────────────────


def spine_schema(entity: Entity) -> pa.Schema:
    """Key columns, the instant, the label."""
    keys = [(column, pa.int64() if dtype == "int64" else pa.string()) for column, dtype in entity.keys.items()]
    return pa.schema([*keys, (AS_OF, TIMESTAMP), (LABEL, pa.float64())])


def spine_rows(spec: ModelSpec, events: Mapping[str, pa.Table], instants_us: Sequence[int]) -> pa.Table:
    """Who belongs to the population at each instant, and what became of them.

    An entity belongs to it if it has an event before the instant, in any source of the model; with
    ``active_within``, in so long before it. The label looks at ``q ≤ event_time < q + horizon``.

    Args:
        spec: Says population and label.
        events: By name of the source: the events of one bucket, each id once. The label's source must
            be among them.
        instants_us: As-of instants.

    Returns:
        Rows of `spine_schema`, by instant and then by key.
    """
    entity = spec.entity
    sources = {source.name: source for source in model_sources(spec)}
    schema = spine_schema(entity)
    key_schema = pa.schema([schema.field(column) for column in entity.key_columns])
    keys = pa.concat_tables([events[name].select(entity.key_columns).cast(key_schema) for name in sources])
    encoded = entity.encode(keys, what=f"events of {', '.join(sources)}").dictionary_encode()
    distinct, codes = encoded.dictionary, encoded.indices.to_numpy(zero_copy_only=False)
    if not len(distinct):
        return schema.empty_table()
    # Codes in the order of the keys, so that rows come out in it.
    order = pc.array_sort_indices(distinct).to_numpy()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    codes = rank[codes]
    example = np.empty(len(order), dtype=np.int64)
    example[codes[::-1]] = np.arange(len(codes))[::-1]

    times = np.concatenate([times_us(events[name].column(source.event_time)) for name, source in sources.items()])
    by_time = np.argsort(times, kind="stable")
    times, active = times[by_time], codes[by_time]
    parts: list[pa.Table] = []
    for instant_us in sorted(instants_us):
        since_us = spec.population.active_within_us
        low = 0 if since_us is None else np.searchsorted(times, instant_us - since_us)
        members = np.unique(active[low : np.searchsorted(times, instant_us)])
        columns = [keys.column(column).take(pa.array(example[members])) for column in entity.key_columns]
        instant = pa.array(np.full(len(members), instant_us), pa.int64()).cast(TIMESTAMP)
        parts.append(pa.table([*columns, instant], schema=schema.remove(len(schema) - 1)))
    spine = pa.concat_tables(parts)
    labels = label_values(
        spec.label, entity, events[spec.label.source.name], entity.encode(spine), times_us(spine.column(AS_OF))
    )
    return spine.append_column(schema.field(LABEL), pa.array(labels))


def model_sources(spec: ModelSpec) -> tuple[EventSource, ...]:
    """The sources that a model looks at, each once: its views', then its label's."""
    sources = [*(view.source for view in spec.views), spec.label.source]
    return tuple({source.name: source for source in sources}.values())


# ── The whole set ───────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows as arrays.

    Attributes:
        matrix: Feature values, shape ``(n, k)``, in the model's order; NaN is null.
        labels: Shape ``(n,)``.
        as_of_us: Shape ``(n,)``.
        entities: A number for each entity, shape ``(n,)``.
    """

    matrix: FloatArray
    labels: FloatArray
    as_of_us: IntArray
    entities: IntArray

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, mask: NDArray[np.bool_]) -> Examples:
        """Some of the rows."""
        return Examples(self.matrix[mask], self.labels[mask], self.as_of_us[mask], self.entities[mask])


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Rows with labels and features, and where they come from.

    Attributes:
        spec: The model they are for.
        table: Key columns, ``as_of``, ``label`` and the features, by instant and then by key.
        split: At which instants.
        log_versions: Version of each source's event log that was read.
    """

    spec: ModelSpec
    table: pa.Table
    split: Split
    log_versions: Mapping[str, int]

    @cached_property
    def examples(self) -> Examples:
        """All rows as arrays."""
        columns = [
            self.table.column(name).to_numpy().astype(np.float64, copy=False) for name in self.spec.feature_names
        ]
        keys = self.spec.entity.encode(self.table, what="the training set")
        return Examples(
            np.ascontiguousarray(np.column_stack(columns)),
            self.table.column(LABEL).to_numpy(),
            times_us(self.table.column(AS_OF)),
            hash64(keys).astype(np.int64),
        )

    @property
    def training(self) -> Examples:
        """The rows to learn from."""
        return self._at(self.split.train_us)

    @property
    def validation(self) -> Examples:
        """The rows to judge by; no training step may see them."""
        return self._at(self.split.validation_us)

    def _at(self, instants_us: Sequence[int]) -> Examples:
        return self.examples.where(np.isin(self.examples.as_of_us, instants_us))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the rows and of all that they follow from.

        Another machine that reads the same version of the log with the same definitions gets the same.
        """
        digest = hashlib.sha256(content_hash(self.origin()).encode())
        for name in self.table.column_names:
            column = self.table.column(name)
            digest.update(f"{name}:{column.type}:{len(column)}:{column.null_count};".encode())
            digest.update(_canonical(column).tobytes())
        return digest.hexdigest()

    def origin(self) -> dict[str, Any]:
        """What the rows follow from, as a JSON document."""
        return {
            "model": self.spec.name,
            "views": {view.ref: view.content_hash for view in self.spec.views},
            "label": self.spec.label.content_hash,
            "population": self.spec.population.active_within,
            "log_versions": dict(self.log_versions),
            "train": [format_instant(each) for each in self.split.train_us],
            "validation": [format_instant(each) for each in self.split.validation_us],
        }


def _canonical(column: pa.ChunkedArray) -> NDArray[Any]:
    """Eight bytes a value, the same for equal values: one NaN, one zero, hashes of texts."""
    if pa.types.is_floating(column.type):
        values = column.to_numpy().astype("<f8") + 0.0
        return np.where(np.isnan(values), np.nan, values)
    if pa.types.is_string(column.type):
        return hash64(column).astype("<u8")
    whole: NDArray[np.int64] = column.cast(pa.int64()).to_numpy().astype("<i8")
    return whole
