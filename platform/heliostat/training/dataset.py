"""Which rows a model learns from: entities, instants, labels and features, split by time.

1. `split_instants` decides at which instants entities are looked at. A label needs its whole
   horizon to have passed, and no validation label may overlap training's.
2. `build_training_set` takes each bucket's rows (`heliostat.models.rows`), one Ray task a bucket, all
   from one version of the event log.
3. A `TrainingSet` has a fingerprint, so that a model version can say exactly what it was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.clock import US_PER_DAY, format_duration, format_instant
from heliostat.errors import TrainingDataError
from heliostat.features.aggregations import FloatArray
from heliostat.features.bucket_tasks import over_buckets
from heliostat.features.definitions import FeatureRef, content_hash
from heliostat.models.definitions import ModelSpec
from heliostat.models.rows import LABEL, ModelRows, model_sources
from heliostat.models.spine import AS_OF, ModelSpine
from heliostat.schema import hash64, times_us
from heliostat.storage.event_log import EventLog

IntArray = NDArray[np.int64]
RowsOf = Callable[[ModelRows], pa.Table]

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
        of_spine: Rows are a spine's: instants are the first and the last of each part, and all between them.
    """

    train_us: tuple[int, ...]
    validation_us: tuple[int, ...]
    gap_us: tuple[int, ...] = ()
    of_spine: bool = False

    @property
    def all_us(self) -> tuple[int, ...]:
        """Training's, then validation's."""
        return self.train_us + self.validation_us

    def watched_from_us(self, as_of_us: IntArray) -> int:
        """From when on training rows are watched while fitting: the last instant; of a spine, the last fifth."""
        return int(np.sort(as_of_us)[4 * len(as_of_us) // 5]) if self.of_spine else self.train_us[-1]


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


def split_spine(
    spine: ModelSpine,
    validation_us: Sequence[int] = (),
    *,
    horizon_us: int,
    now_us: int,
    model: str = "model",
) -> Split:
    """Split a spine by time: its last rows validate, those a label horizon earlier train.

    Args:
        spine: The rows.
        validation_us: The first of them says from when on rows validate; without any, the last fifth does.
        horizon_us: The label's.
        now_us: The present: a label is known once its horizon has passed.
        model: How messages name it.

    Raises:
        TrainingDataError: If labels aren't known yet, or nothing is left to train on or to judge by.
    """
    instants = np.sort(np.concatenate([times_us(rows.column(AS_OF)) for rows in spine.buckets.values()]))
    late = int((instants > now_us - horizon_us).sum())
    horizon = format_duration(horizon_us)
    if late:
        raise TrainingDataError(
            model,
            f"the labels of {late:,} of the spine's {len(instants):,} rows look {horizon} ahead, and it is "
            f"{format_instant(now_us)}",
            f"leave out rows after {format_instant(now_us - horizon_us)}",
        )
    from_us = min(validation_us) if validation_us else int(instants[4 * len(instants) // 5])
    train, validation = instants[instants <= from_us - horizon_us], instants[instants >= from_us]
    if not len(train) or not len(validation):
        raise TrainingDataError(
            model,
            f"the spine has {len(train):,} rows up to a label horizon ({horizon}) before {format_instant(from_us)}, "
            f"and {len(validation):,} from then on",
            f"its rows reach from {format_instant(spine.first_us)} to {format_instant(spine.last_us)}: validate from "
            "another instant, or give more rows",
        )
    return Split((int(train[0]), int(train[-1])), (int(validation[0]), int(validation[-1])), of_spine=True)


def _grid(last_us: int, first_event_us: int) -> list[int]:
    steps = min(DEFAULT_INSTANTS, max(0, (last_us - first_event_us) // DEFAULT_STEP_US))
    return sorted(last_us - step * DEFAULT_STEP_US for step in range(int(steps)))


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
        spine: Digest of the spine that named the rows; empty if the model's population did.
    """

    spec: ModelSpec
    table: pa.Table
    split: Split
    log_versions: Mapping[str, int]
    spine: str = ""

    @cached_property
    def examples(self) -> Examples:
        """All rows as arrays."""
        keys = self.spec.entity.encode(self.table, what="the training set")
        return Examples(
            self.matrix(self.spec.feature_names),
            self.table.column(LABEL).to_numpy(),
            times_us(self.table.column(AS_OF)),
            hash64(keys).astype(np.int64),
        )

    def matrix(self, names: Sequence[str]) -> FloatArray:
        """Some features of all rows, shape ``(n, len(names))``; NaN is null."""
        return np.ascontiguousarray(np.column_stack([self.table.column(name).to_numpy() for name in names]))

    @cached_property
    def is_validation(self) -> NDArray[np.bool_]:
        """Which rows are to judge by, shape ``(n,)``."""
        return self.examples.as_of_us >= self.split.validation_us[0]

    @property
    def training(self) -> Examples:
        """The rows to learn from."""
        return self.examples.where(~self.is_validation)

    @property
    def validation(self) -> Examples:
        """The rows to judge by; no training step may see them."""
        return self.examples.where(self.is_validation)

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
        spine = {"spine": self.spine} if self.spine else {}
        return {
            **spine,
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


def build_training_set(
    spec: ModelSpec,
    event_log: EventLog,
    split: Split,
    *,
    extra: Sequence[FeatureRef] = (),
    spine: ModelSpine | None = None,
    rows_of: RowsOf | None = None,
) -> TrainingSet:
    """Take a model's rows at a split's instants, or a spine's, one Ray task a bucket.

    Args:
        spec: The model.
        event_log: Where its events are.
        split: Instants.
        extra: Features beyond the model's own, such as those of the version in production.
        spine: The rows, where they aren't the population's; `split_spine` has split it.
        rows_of: Takes the rows of all buckets; by default with Ray Data.

    Raises:
        MissingInputError: If features take inputs of the request, and no spine has them.
        TrainingDataError: If there are no rows to learn from or to judge by.
        StorageError: If the log can't be read.
    """
    rows = ModelRows.of(spec, event_log, split.all_us, extra=extra, spine=spine)
    table = (rows_of or rows_with_ray)(rows)
    if split.of_spine:
        at_us = times_us(table.column(AS_OF))
        table = table.filter(pa.array((at_us <= split.train_us[-1]) | (at_us >= split.validation_us[0])))
    order = [(AS_OF, "ascending"), *((column, "ascending") for column in spec.entity.key_columns)]
    digest = "" if spine is None else spine.digest
    training_set = TrainingSet(spec, table.sort_by(order).combine_chunks(), split, rows.log_versions, digest)
    for what, instants, found in (
        ("learn from", split.train_us, len(training_set.training)),
        ("judge by", split.validation_us, len(training_set.validation)),
    ):
        if not found:
            times = ", ".join(format_instant(each) for each in instants)
            sources = ", ".join(source.name for source in rows.sources)
            raise TrainingDataError(
                spec.name,
                f"there are no rows to {what}: nobody has an event before {times}",
                f"ingest events of {sources} (heliostat ingest), or take later instants",
            )
    return training_set


def rows_with_ray(rows: ModelRows) -> pa.Table:
    """The rows of all buckets, one Ray task each, in no order."""
    return pa.concat_tables([rows.schema.empty_table(), *over_buckets(rows.table, rows.event_log.n_buckets)])


def first_event_us(spec: ModelSpec, event_log: EventLog) -> int:
    """When the first event of a model's sources happened.

    Raises:
        TrainingDataError: If there is none.
    """
    found = [event_log.statistics(source, spec.entity).min_time_us for source in model_sources(spec)]
    known = [each for each in found if each is not None]
    if not known:
        names = ", ".join(source.name for source in model_sources(spec))
        raise TrainingDataError(spec.name, f"there are no events of {names} yet", "ingest some: heliostat ingest")
    return min(known)
