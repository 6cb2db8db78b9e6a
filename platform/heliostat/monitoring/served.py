"""Rows of the prediction log as arrays: what every monitor starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.features.definitions import Entity
from heliostat.models.definitions import ModelSpec
from heliostat.schema import hash64, times_us
from heliostat.storage.offline_store import OfflineStore

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

COLUMNS: Final = ("prediction_id", "entity", "at", "revision", "variant", "version", "score", "source")
"""The prediction log's columns that monitors read."""

VECTORS: Final = "features"
"""The column of what the model saw; most of the log's bytes, so it is read where it is needed."""

GIVEN: Final = "given"
"""The column of which of these values the request brought along; read with them."""


INPUTS: Final = "inputs"
"""The column of what the request brought for derived features, as JSON; read with them."""


@dataclass(frozen=True, eq=False)
class ServedRows:
    """Predictions that were given out, ``n`` of them.

    Attributes:
        table: `COLUMNS` of the prediction log, and `VECTORS` with `GIVEN` and `INPUTS` where they were asked for.
        entity: Whom they are about.
    """

    table: pa.Table
    entity: Entity

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def keys(self) -> pa.Array:
        """Encoded entity keys, length ``n``."""
        return self.entity.encoded(self.table.column("entity").to_pylist())

    @property
    def at_us(self) -> IntArray:
        """Instants of the features, shape ``(n,)``, microseconds."""
        return times_us(self.table.column("at"))

    @property
    def scores(self) -> FloatArray:
        """Predictions, shape ``(n,)``."""
        return np.asarray(self.table.column("score").to_numpy(), dtype=np.float64)

    @property
    def ids(self) -> list[str]:
        """Prediction ids, ``n`` of them."""
        return list(self.table.column("prediction_id").to_pylist())

    @property
    def given(self) -> list[list[str] | None]:
        """For each row, the qualified features that the request gave; None where nobody wrote that down."""
        return list(self.table.column(GIVEN).to_pylist())

    def brought(self, names: Sequence[str]) -> tuple[dict[str, FloatArray], NDArray[np.bool_]]:
        """What the requests brought for derived features.

        Args:
            names: Inputs.

        Returns:
            Values by input, NaN for null, and the rows in which all of them are written down: shape ``(n,)`` each.
        """
        rows = [orjson.loads(text) if text else {} for text in self.table.column(INPUTS).to_pylist()]
        values = {name: np.array([row.get(name) for row in rows], dtype=np.float64) for name in names}
        return values, np.array([all(name in row for name in names) for row in rows], dtype=np.bool_)

    @property
    def variants(self) -> NDArray[np.str_]:
        """Variants that served, shape ``(n,)``."""
        return np.asarray(self.table.column("variant").to_pylist(), dtype=np.str_)

    def of_version(self, version: int) -> ServedRows:
        """The rows that one version answered by itself, not a fallback."""
        by_model = pc.equal(self.table.column("source"), "model")
        return self._where(pc.and_(pc.equal(self.table.column("version"), version), by_model))

    def with_vectors(self, n_features: int) -> ServedRows:
        """The rows whose logged vector has ``n_features`` values."""
        return self._where(pc.equal(pc.list_value_length(self.table.column(VECTORS)), n_features))

    def matrix(self, n_features: int) -> FloatArray:
        """What the model saw, shape ``(n, n_features)``; NaN is null. See `with_vectors`."""
        lists = self.table.column(VECTORS).combine_chunks()
        values = pc.list_flatten(lists).cast(pa.float64()).to_numpy(zero_copy_only=False)
        return np.asarray(values, dtype=np.float64).reshape(len(self), n_features)

    def newest_each(self) -> ServedRows:
        """One row an entity, the newest: repeated rows of one entity aren't independent evidence."""
        order = np.lexsort((hash64(self.table.column("prediction_id")), self.at_us))[::-1]
        _, first = np.unique(hash64(self.table.column("entity"))[order], return_index=True)
        return ServedRows(self.table.take(pa.array(np.sort(order[first]))), self.entity)

    def sample(self, size: int) -> ServedRows:
        """At most ``size`` rows, chosen by the hash of their ids: the same ones each time, and without a bias."""
        if len(self) <= size:
            return self
        chosen = np.argpartition(hash64(self.table.column("prediction_id")), size)[:size]
        return ServedRows(self.table.take(pa.array(np.sort(chosen))), self.entity)

    def _where(self, condition: pa.ChunkedArray) -> ServedRows:
        return ServedRows(self.table.filter(pc.fill_null(condition, False)), self.entity)


def read_served(
    store: OfflineStore, spec: ModelSpec, *, from_us: int, until_us: int, vectors: bool = True
) -> ServedRows:
    """Read a stretch of a model's prediction log; nothing yet reads as empty.

    Args:
        store: Where it is kept.
        spec: The model.
        from_us: First instant, microseconds since the epoch.
        until_us: End, exclusive.
        vectors: Whether to read what the model saw.
    """
    columns = [*COLUMNS, VECTORS, GIVEN, INPUTS] if vectors else list(COLUMNS)
    table = store.read_predictions(spec.name, start_us=from_us, end_us=until_us, columns=columns)
    return ServedRows(table, spec.entity)


def reported_labels(store: OfflineStore, spec: ModelSpec, rows: ServedRows, *, now_us: int) -> FloatArray:
    """Labels that somebody has reported for predictions, by prediction id; the newest report counts.

    Args:
        store: Where they are kept.
        spec: The model.
        rows: Predictions, ``n`` of them.
        now_us: The present: reports from before it.

    Returns:
        Shape ``(n,)``; NaN where nothing was reported.
    """
    labels = np.full(len(rows), np.nan)
    if not len(rows):
        return labels
    actuals = store.read_actuals(spec.name, start_us=int(rows.at_us.min()), end_us=now_us + 1)
    actuals = actuals.filter(pc.is_valid(actuals.column("prediction_id"))).sort_by([("at", "descending")])
    places = pc.index_in(
        rows.table.column("prediction_id"), value_set=actuals.column("prediction_id").combine_chunks()
    ).combine_chunks()
    known = places.is_valid().to_numpy(zero_copy_only=False)
    labels[known] = actuals.column("value").take(places.drop_null()).to_numpy()
    return labels
