"""Rows of the prediction log as arrays: what every monitor starts from. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.features.definitions import Entity
from heliostat.schema import hash64, times_us

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

COLUMNS = ("prediction_id", "entity", "at_us", "revision", "variant", "version", "score", "features", "source")
"""The prediction log's columns that monitors read."""


@dataclass(frozen=True, eq=False)
class ServedRows:
    """Predictions that were given out, ``n`` of them.

    Attributes:
        table: `COLUMNS` of the prediction log.
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
        return times_us(self.table.column("at_us"))

    @property
    def scores(self) -> FloatArray:
        """Predictions, shape ``(n,)``."""
        return np.asarray(self.table.column("score").to_numpy(), dtype=np.float64)

    @property
    def variants(self) -> NDArray[np.str_]:
        """Variants that served, shape ``(n,)``."""
        return np.asarray(self.table.column("variant").to_pylist(), dtype=np.str_)

    def matrix(self, n_features: int) -> FloatArray:
        """What the model saw, shape ``(n, n_features)``; NaN is null.

        Only of rows that hold ``n_features`` values, see `of_version`.
        """
        lists = self.table.column("features").combine_chunks()
        values = pc.list_flatten(lists).cast(pa.float64()).to_numpy(zero_copy_only=False)
        return np.asarray(values, dtype=np.float64).reshape(len(self), n_features)

    def of_version(self, version: int, n_features: int) -> ServedRows:
        """The rows that one version answered by itself: no fallback, and its whole vector at hand."""
        table = self.table
        whole = pc.equal(pc.list_value_length(table.column("features")), n_features)
        by_model = pc.equal(table.column("source"), "model")
        chosen = pc.and_(pc.equal(table.column("version"), version), pc.and_(by_model, whole))
        return ServedRows(table.filter(pc.fill_null(chosen, False)), self.entity)

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
