"""Rows that somebody chose: entities, instants, and what a request brought there. Pure.

A model's population says who gets a row at which instants. Where that isn't enough (the model takes inputs
of the request, or rows are transactions), a spine says it: a table with the entity's key columns, ``as_of``
and one column for each input. The same rows train a model and are predicted for in batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from heliostat.errors import InvalidValueError, MissingFileError, SpineError
from heliostat.features.bucket_join import spine_instants_us
from heliostat.features.request import RequestTypes, request_columns
from heliostat.models.definitions import ModelSpec
from heliostat.schema import TIMESTAMP, arrow_type, cast_column, hash64

AS_OF = "as_of"


@dataclass(frozen=True, eq=False)
class ModelSpine:
    """Rows for a model, by the bucket of their entity; picklable.

    Attributes:
        buckets: Key columns, ``as_of`` (microseconds, UTC) and inputs (float64, null as NaN), in the given order.
        request: The inputs' types, by name.
        digest: SHA-256 of the rows.
        first_us: The earliest instant.
        last_us: The latest instant.
        n_rows: How many rows.
    """

    buckets: Mapping[int, pa.Table]
    request: RequestTypes
    digest: str
    first_us: int
    last_us: int
    n_rows: int

    @classmethod
    def of(cls, table: pa.Table, spec: ModelSpec, n_buckets: int, *, also: RequestTypes | None = None) -> ModelSpine:
        """Check a table, and part it by bucket.

        Args:
            table: Key columns of the model's entity, ``as_of`` and the model's inputs; others are passed over.
            spec: The model.
            n_buckets: The event log's number of buckets.
            also: Further inputs that somebody else needs, such as the version in production.

        Raises:
            KeyColumnError: If a key column is missing, null or of the wrong type.
            SpineError: If it has no rows, or instants or inputs are missing or of the wrong type.
        """
        what = f"the spine of model {spec.name!r}"
        names = tuple(table.column_names)
        if not table.num_rows:
            raise SpineError("has no rows", "give at least one", names, what)
        if AS_OF not in names:
            raise SpineError(f"has no column {AS_OF!r} of instants", "add it", names, what)
        request = {**(also or {}), **spec.inputs}
        keys = spec.entity.encode(table, what=what)
        as_of_us = spine_instants_us(table, AS_OF)
        columns = {
            **{
                column: cast_column(table.column(column), arrow_type(dtype)).combine_chunks()
                for column, dtype in spec.entity.keys.items()
            },
            AS_OF: pa.array(as_of_us, pa.int64()).cast(TIMESTAMP),
            **{name: pa.array(values) for name, values in request_columns(table, request, what=what).items()},
        }
        rows, buckets = pa.table(columns), spec.entity.buckets(keys, n_buckets)
        order = np.argsort(buckets, kind="stable")
        sorted_rows, sorted_buckets = rows.take(pa.array(order)), buckets[order]
        begins = np.flatnonzero(np.diff(sorted_buckets, prepend=-1))
        ends = np.append(begins[1:], len(order))
        parts = {
            int(sorted_buckets[begin]): sorted_rows.slice(begin, end - begin)
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        }
        return cls(parts, request, _digest(rows), int(as_of_us.min()), int(as_of_us.max()), rows.num_rows)

    def rows(self, bucket: int) -> pa.Table:
        """One bucket's rows."""
        found = self.buckets.get(bucket)
        return next(iter(self.buckets.values())).slice(0, 0) if found is None else found


def _digest(rows: pa.Table) -> str:
    digest = hashlib.sha256(f"{rows.schema}".encode())
    for column in rows.columns:
        if pa.types.is_string(column.type):
            digest.update(hash64(column).astype("<u8").tobytes())
        else:
            plain = column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column
            digest.update(np.ascontiguousarray(plain.to_numpy()).tobytes())
    return digest.hexdigest()


def read_spine(path: str | Path) -> pa.Table:
    """Read a spine from a Parquet or CSV file, or a folder of Parquet files.

    Raises:
        MissingFileError: If there is none.
        InvalidValueError: If it can't be read.
    """
    place = Path(path)
    if not place.exists():
        raise MissingFileError(str(path), "give a Parquet or CSV file with key columns, as_of and inputs")
    try:
        table = pyarrow.csv.read_csv(place) if place.suffix == ".csv" else pq.read_table(place)
    except (pa.ArrowException, OSError) as error:
        expected = f"a Parquet or CSV file ({str(error).splitlines()[0]})"
        raise InvalidValueError("spine", str(path), expected) from None
    return table
