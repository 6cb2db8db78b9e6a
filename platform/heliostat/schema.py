"""Arrow schemas of events, their types, and the hashes that place keys and break ties.

The hash functions here are part of the storage format: the event log's buckets, the
online store's key slots and the order of ties rest on them. They never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.errors import SchemaMismatchError

TIMESTAMP = pa.timestamp("us", tz="UTC")

# Columns that the event log adds to a source's own; all start with an underscore.
INGESTED = "_ingested_us"
ID_HASH = "_id_hash"
TIE = "_tie"
BUCKET = "_bucket"

_ALL_BITS = 2**64 - 1
_FEW = 8  # keys whose hashes take Python's integers less time than numpy's first array

_KEY_TYPES = {"int64": pa.int64(), "string": pa.string()}


def arrow_type(name: str) -> pa.DataType:
    """The Arrow type of a key type's name: ``"int64"`` or ``"string"``."""
    return _KEY_TYPES[name]


def normalized(schema: pa.Schema) -> pa.Schema:
    """The schema as stored: every timestamp in microseconds UTC, strings and integers in one width."""
    return pa.schema([field.with_type(_stored_type(field.type)).remove_metadata() for field in schema])


def _stored_type(dtype: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(dtype) or pa.types.is_date(dtype):
        return TIMESTAMP
    if pa.types.is_integer(dtype):
        return pa.int64()
    if pa.types.is_floating(dtype) or pa.types.is_decimal(dtype):
        return pa.float64()
    if pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype) or pa.types.is_dictionary(dtype):
        return pa.string()
    return dtype


def describe_schema(schema: pa.Schema) -> str:
    """``a: int64, b: string``: for messages and documents."""
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def conform(table: pa.Table, schema: pa.Schema, *, what: str) -> pa.Table:
    """Cast a table to a schema, losing nothing; extra columns are dropped.

    Args:
        table: Any Arrow table.
        schema: What it should be, as `normalized` gives it.
        what: How the message names the table.

    Returns:
        A table with exactly the schema's columns, in its order.

    Raises:
        SchemaMismatchError: Naming every column that is missing or can't be cast.
    """
    columns: list[pa.ChunkedArray] = []
    problems: list[str] = []
    for field in schema:
        if field.name not in table.column_names:
            problems.append(f"column {field.name!r} is missing (there are: {', '.join(table.column_names)})")
            continue
        try:
            columns.append(cast_column(table.column(field.name), field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            found = table.schema.field(field.name).type
            problems.append(f"column {field.name!r} is {found}, not {field.type} ({_first_line(error)})")
    if problems:
        raise SchemaMismatchError(what, tuple(problems), describe_schema(schema))
    return pa.table(columns, schema=schema)


def cast_column(column: pa.ChunkedArray, dtype: pa.DataType) -> pa.ChunkedArray:
    """Cast losslessly; a timestamp without a zone is UTC, and whole floats pass for integers.

    Raises:
        pyarrow.ArrowInvalid: If a value would be changed by the cast.
    """
    if column.type == dtype:
        return column
    if pa.types.is_timestamp(dtype):
        if pa.types.is_integer(column.type):
            return pc.cast(pc.cast(column, pa.int64()), dtype)
        if pa.types.is_timestamp(column.type) and column.type.tz is None:
            return pc.assume_timezone(pc.cast(column, pa.timestamp("us")), "UTC").cast(dtype)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            try:
                return pc.cast(column, dtype)
            except pa.ArrowInvalid:
                return pc.assume_timezone(pc.cast(column, pa.timestamp("us")), "UTC").cast(dtype)
    if pa.types.is_string(dtype) and not (pa.types.is_null(column.type) or _is_text(column.type)):
        raise pa.ArrowTypeError(f"{column.type} is no text")
    return pc.cast(column, dtype)


def _is_text(dtype: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(dtype)
        or pa.types.is_large_string(dtype)
        or pa.types.is_string_view(dtype)
        or pa.types.is_dictionary(dtype)
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def times_us(column: pa.ChunkedArray | pa.Array) -> NDArray[np.int64]:
    """A timestamp column as int64 microseconds; nulls aren't allowed.

    Returns:
        Shape ``(n,)``.
    """
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_timestamp(whole.type):
        whole = whole.cast(TIMESTAMP).cast(pa.int64())
    values: NDArray[np.int64] = whole.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    return values


def hash64(values: pa.ChunkedArray | pa.Array) -> NDArray[np.uint64]:
    """A 64-bit hash of integers or texts, the same on every machine and for ever.

    Integers: splitmix64 (Steele, Lea and Flood 2014). Texts: pandas' keyed SipHash with
    its fixed default key.

    Args:
        values: int64 or string, without nulls.

    Returns:
        Shape ``(n,)``.
    """
    whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if pa.types.is_integer(whole.type):
        return _splitmix64(whole.cast(pa.int64()).to_numpy(zero_copy_only=False).view(np.uint64))
    hashed: NDArray[np.uint64] = pd.util.hash_array(
        np.asarray(whole.to_numpy(zero_copy_only=False), dtype=object), categorize=False
    )
    return hashed


def _splitmix64(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        mixed = keys + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def tie48(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The upper 48 bits of a hash: breaks ties of event time, and fits a float64 exactly."""
    return (hashes >> np.uint64(16)).astype(np.int64)


def text_codes(texts: pa.ChunkedArray | pa.Array) -> NDArray[np.float64]:
    """Each text as a number that is always the same: the upper 48 bits of its hash, exact in a float64.

    Args:
        texts: Strings, or a dictionary of them; null becomes NaN.

    Returns:
        Shape ``(n,)``.
    """
    whole = texts.unify_dictionaries().combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    encoded = whole.dictionary_encode()
    distinct = encoded.dictionary.cast(pa.string())
    codes = np.append(tie48(hash64(distinct)).astype(np.float64), np.nan)
    places: NDArray[np.float64] = codes[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    return places


def text_code(text: str) -> float:
    """One text's number; see `text_codes`."""
    return float(text_codes(pa.array([text]))[0])


def bucket_of(hashes: NDArray[np.uint64], n_buckets: int) -> NDArray[np.int32]:
    """The bucket of each key's hash, in ``[0, n_buckets)``."""
    return (hashes % np.uint64(n_buckets)).astype(np.int32)


def integer_buckets(keys: Sequence[int], n_buckets: int) -> list[int]:
    """The buckets of a request's integer keys: as `bucket_of` of `hash64`, sooner where there are few.

    Args:
        keys: Integers of 64 bits, with sign.
        n_buckets: The event log's number of buckets.
    """
    if len(keys) > _FEW:
        mixed = _splitmix64(np.array(keys, dtype=np.int64).view(np.uint64))
        buckets: list[int] = bucket_of(mixed, n_buckets).tolist()
        return buckets
    return [_splitmix64_of(key) % n_buckets for key in keys]


def _splitmix64_of(key: int) -> int:
    mixed = (key + 0x9E3779B97F4A7C15) & _ALL_BITS
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _ALL_BITS
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _ALL_BITS
    return mixed ^ (mixed >> 31)


def to_python(value: Any) -> Any:  # noqa: ANN401 - any scalar
    """A numpy or Arrow scalar as the Python value that JSON can carry."""
    if isinstance(value, pa.Scalar):
        return value.as_py()
    return value.item() if isinstance(value, np.generic) else value
