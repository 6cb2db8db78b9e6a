"""What a request or a spine brings itself: inputs of derived features, as numbers. Pure.

A view declares ``request={"amount": "float64"}``; its derived functions may take ``amount`` beside the
view's features. In training the values are a column of the spine, in serving a field of the request.
Both go through this file, so that a function sees the same number: `request_columns` reads a
table, `request_value` one value of JSON, and they take and refuse the same.

Null is a value: the function gets NaN. A value that isn't there at all is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import pyarrow as pa

from heliostat.errors import DuplicateNameError, SpineError
from heliostat.features.aggregations import FloatArray
from heliostat.schema import cast_column

RequestType = Literal["float64", "int64", "bool"]
RequestTypes: TypeAlias = Mapping[str, RequestType]
"""Type by name, as a view declares them."""

REQUEST_TYPES: tuple[RequestType, ...] = ("float64", "int64", "bool")
EXPECTED: Mapping[RequestType, str] = {
    "float64": "a finite number or null",
    "int64": "a whole number or null",
    "bool": "true, false or null",
}
"""What each type takes, in words."""

_ARROW: Mapping[RequestType, pa.DataType] = {"float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_()}


def request_value(value: Any, dtype: RequestType) -> float:  # noqa: ANN401 - whatever somebody sent
    """One value of a request as the number that a function gets; NaN is null.

    Args:
        value: As JSON gave it.
        dtype: As declared.

    Raises:
        ValueError: If the value is of another type; `EXPECTED` says what was expected.
    """
    if value is None:
        return math.nan
    truth = isinstance(value, bool)
    if truth != (dtype == "bool") or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} isn't {EXPECTED[dtype]}")
    if dtype == "int64" and (value != int(value) or not -(2**63) <= value < 2**63):
        raise ValueError(f"{value!r} isn't {EXPECTED[dtype]}")
    return float(value)


def merged_types(declared: Sequence[tuple[str, RequestTypes]]) -> dict[str, RequestType]:
    """What several views take of one request: a name is one value for all of them.

    Args:
        declared: A view's reference, and what it takes.

    Raises:
        DuplicateNameError: If two views declare one name with two types.
    """
    merged: dict[str, RequestType] = {}
    for view, types in declared:
        for name, dtype in types.items():
            if merged.setdefault(name, dtype) != dtype:
                raise DuplicateNameError("request input of another type", name, f"feature view {view!r}")
    return merged


def request_columns(table: pa.Table, needed: RequestTypes, *, what: str = "the spine") -> dict[str, FloatArray]:
    """Columns of a table as the numbers that functions get; NaN is null.

    Args:
        table: ``n`` rows; may have other columns.
        needed: Which columns, and of what type.
        what: How messages name the table.

    Returns:
        Arrays of shape ``(n,)`` by name.

    Raises:
        SpineError: If a column is missing, of another type, or holds infinite values.
    """
    check_request_columns(table.schema, needed, what=what)
    return {name: _numbers(table, name, dtype, what) for name, dtype in needed.items()}


def check_request_columns(schema: pa.Schema, needed: RequestTypes, *, what: str = "the spine") -> None:
    """Refuse a table that lacks a column, or has one of another type.

    Raises:
        SpineError: Naming the column and what it should be.
    """
    for name, dtype in needed.items():
        if name not in schema.names:
            raise SpineError(f"has no column {name!r}", missing_column(dtype), tuple(schema.names), what)
        found = schema.field(name).type
        if not (pa.types.is_null(found) or _fits(found, dtype)):
            raise SpineError(f"has a column {name!r} that is {found}", f"make it {dtype}", tuple(schema.names), what)


def missing_column(dtype: RequestType) -> str:
    """What to do about a column that a spine lacks."""
    return f"add it as {dtype}: a derived feature takes it from the request"


def _fits(found: pa.DataType, dtype: RequestType) -> bool:
    if dtype == "bool":
        return bool(pa.types.is_boolean(found))
    return bool(pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found))


def _numbers(table: pa.Table, name: str, dtype: RequestType, what: str) -> FloatArray:
    try:
        column = cast_column(_without_nan(table.column(name)), _ARROW[dtype])
    except pa.ArrowInvalid as error:
        problem = f"has values in column {name!r} that are no {dtype} ({str(error).splitlines()[0]})"
        raise SpineError(problem, f"make it {dtype}, or null", tuple(table.column_names), what) from None
    whole = column.combine_chunks()
    plain = whole.cast(pa.uint8()) if dtype == "bool" else whole
    values: FloatArray = plain.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    if np.isinf(values).any():
        fix = "a request can't carry them: drop those rows, or make the values null"
        raise SpineError(f"has infinite values in column {name!r}", fix, tuple(table.column_names), what)
    return values


def _without_nan(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """NaN as null: a frame of pandas has no other null among numbers."""
    if not pa.types.is_floating(column.type):
        return column
    values = column.to_numpy()
    return pa.chunked_array([pa.array(values, column.type, mask=np.isnan(values))])


class UniformOverrides(Mapping[int, Mapping[str, float]]):
    """Feature values that requests give, by row, where all rows give the same features: an array, not a dict a row.

    That is what programs send. To whoever looks at single rows it is a mapping like any other.

    Args:
        names: The features, at least one, as the requests name them.
        matrix: Shape ``(n, len(names))``, ``n ≥ 1``; NaN for null, nothing infinite.
    """

    __slots__ = ("matrix", "names")

    def __init__(self, names: tuple[str, ...], matrix: FloatArray) -> None:
        self.names, self.matrix = names, matrix

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any] | None]) -> Self | None:
        """What rows give, if all give the same names in one order, and finite numbers or NaN alone; None if not."""
        names = tuple(rows[0] or ()) if rows else ()
        if not names or any(each is None or tuple(each) != names for each in rows):
            return None
        given = cls._numbers(chain.from_iterable(each.values() for each in rows if each is not None))
        return None if given is None else cls(names, given.reshape(len(rows), len(names)))

    @classmethod
    def of_columns(cls, columns: Mapping[str, Sequence[Any]]) -> Self | None:
        """The same of columns, at least one, all of one length; None if they are empty, too."""
        given = cls._numbers(chain.from_iterable(columns.values()))
        return None if given is None else cls(tuple(columns), given.reshape(len(columns), -1).T)

    @staticmethod
    def _numbers(values: Iterable[Any]) -> FloatArray | None:
        """Finite numbers or NaN, at least one, as an array; None of anything else."""
        given = list(values)
        if not given or not set(map(type, given)) <= {float, int}:
            return None
        try:
            found = np.array(given, dtype=np.float64)
        except OverflowError:
            return None
        return None if np.isinf(found).any() else found

    @classmethod
    def joined(cls, parts: Sequence[Mapping[int, Mapping[str, float]]]) -> Self | None:
        """Several, one after the other, if all of them are uniform and name the same; None if not."""
        uniform = [each for each in parts if isinstance(each, cls)]
        if not uniform or len(uniform) < len(parts) or any(each.names != uniform[0].names for each in uniform):
            return None
        return cls(uniform[0].names, np.concatenate([each.matrix for each in uniform]))

    def __getitem__(self, row: int) -> Mapping[str, float]:
        if not 0 <= row < len(self.matrix):
            raise KeyError(row)
        return dict(zip(self.names, self.matrix[row].tolist(), strict=True))

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.matrix)))

    def __len__(self) -> int:
        return len(self.matrix)
