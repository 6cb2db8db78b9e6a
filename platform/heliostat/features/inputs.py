"""What aggregations look at: a column or an expression of a source's events, and a condition.

Evaluated once a batch, for all features together. Null, NaN and ±Inf are no values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import acero

from heliostat.errors import ExpressionError, UnknownColumnError
from heliostat.schema import text_codes

FloatArray = NDArray[np.float64]
ColumnLike: TypeAlias = str | pc.Expression
Categories: TypeAlias = tuple[str, ...] | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Input:
    """What an aggregation looks at: a column or expression, and which events count.

    Attributes:
        column: Column name or expression; None means the event itself.
        where: Condition an event must meet (null is not met), or None.
        nulls: Whether an event counts that has no value: then it says "null", instead of nothing.
        texts: Whether texts are taken: as their codes (`heliostat.schema.text_codes`).
        categories: The only values that count, if there are any; one's value is then 2^position.
    """

    column: ColumnLike | None
    where: pc.Expression | None
    nulls: bool = False
    texts: bool = False
    categories: Categories = ()

    @cached_property
    def key(self) -> str:
        """Equal for inputs that mean the same."""
        nulls = " | nulls" if self.nulls else ""
        categories = f" | {list(self.categories)!r}" if self.categories else ""
        return f"{text_of(self.column)} | {text_of(self.where)}{nulls}{categories}"


@dataclass(frozen=True)
class InputValues:
    """An input, evaluated on a batch of events.

    Attributes:
        values: Shape ``(n,)``; 1.0 where the input is the event itself. Undefined where not used.
        used: Shape ``(n,)``: the condition holds, and the value is finite or `Input.nulls` says it needn't be.
    """

    values: FloatArray
    used: NDArray[np.bool_]


@dataclass
class OrderedInput:
    """An input in the order of events; brought into it when somebody looks.

    Attributes:
        given: As the events were given.
        order: Where each event was among them, shape ``(n,)``.
    """

    given: InputValues
    order: NDArray[np.int64]

    @cached_property
    def uses_every(self) -> bool:
        """Whether every event is used."""
        return bool(self.given.used.all())

    @cached_property
    def values(self) -> FloatArray:
        """Shape ``(n,)``, without negative zeros: which one a minimum keeps is a matter of place."""
        return self.given.values[self.order] + 0.0

    @cached_property
    def used(self) -> NDArray[np.bool_]:
        """Shape ``(n,)``."""
        return self.given.used[self.order]


def evaluate(events: pa.Table, inputs: Iterable[Input]) -> dict[str, InputValues]:
    """Evaluate inputs on a batch of events: once each, by `Input.key`.

    Args:
        events: Columns of the source, ``n`` rows.
        inputs: Any; equal keys are evaluated once.

    Returns:
        Arrays of shape ``(n,)`` by input key.

    Raises:
        pyarrow.ArrowInvalid: If an expression names a column that isn't there.
    """
    distinct = {each.key: each for each in inputs}
    parts = _Parts(events, [part for each in distinct.values() for part in (each.column, each.where)])
    n = events.num_rows
    result: dict[str, InputValues] = {}
    for key, each in distinct.items():
        if each.column is None:
            values, used = np.ones(n), np.ones(n, dtype=np.bool_)
        else:
            convert = (
                partial(_members, categories=each.categories)
                if each.categories
                else partial(_numbers, nulls=each.nulls)
            )
            values, used = parts.arrays(each.column, convert)
        if each.where is not None:
            (meets,) = parts.arrays(each.where, _as_mask)
            used = used & meets
        result[key] = InputValues(values, used)
    return result


class _Parts:
    """Columns and expressions of a batch of events, as arrays.

    What looks at nothing but one column of texts in a dictionary is worked out once a text, not once an event.

    Args:
        events: ``n`` rows.
        parts: What will be asked for.
    """

    def __init__(self, events: pa.Table, parts: Iterable[ColumnLike | None]) -> None:
        self._found: dict[str, tuple[pa.ChunkedArray, NDArray[np.int32] | None]] = {}
        coded = [name for name in events.column_names if pa.types.is_dictionary(events.schema.field(name).type)]
        texts = [_texts_of(name, events.column(name)) for name in coded]
        rest: dict[str, ColumnLike] = {}
        for part in parts:
            if part is None or str(part) in self._found:
                continue
            for table, places in texts:
                column = _only_of(table, part)
                if column is not None:
                    self._found[str(part)] = column, places
                    break
            else:
                rest[str(part)] = part
        expressions = {key: part for key, part in rest.items() if not isinstance(part, str)}
        if expressions:
            for name in coded:
                place = events.schema.get_field_index(name)
                events = events.set_column(place, name, events.column(name).cast(pa.string()))
        projected = _project(events, expressions)
        for key, part in rest.items():
            self._found[key] = (events.column(part) if isinstance(part, str) else projected[key]), None

    def arrays(
        self, part: ColumnLike, convert: Callable[[pa.ChunkedArray], tuple[NDArray[Any], ...]]
    ) -> tuple[NDArray[Any], ...]:
        """Arrays of shape ``(n,)`` each, as a conversion makes them of a column."""
        column, places = self._found[str(part)]
        found = convert(column)
        return found if places is None else tuple(each[places] for each in found)


def _texts_of(name: str, column: pa.ChunkedArray) -> tuple[pa.Table, NDArray[np.int32]]:
    """The distinct texts of a column and null, and which of them each row has."""
    whole = column.unify_dictionaries().combine_chunks()
    texts = pa.concat_arrays([whole.dictionary.cast(pa.string()), pa.nulls(1, pa.string())])
    places = whole.indices.fill_null(len(texts) - 1).to_numpy(zero_copy_only=False)
    return pa.table({name: texts}), places


def _only_of(table: pa.Table, part: ColumnLike) -> pa.ChunkedArray | None:
    """A column or expression of a table; None if it can't be had from that alone."""
    if isinstance(part, str):
        return table.column(part) if part in table.column_names else None
    try:
        return _project(table, {"part": part})["part"]
    except pa.ArrowException:
        return None


def check_input(given: Input, schema: pa.Schema, *, at: str) -> None:
    """Refuse an input that a source can't answer.

    Args:
        given: Column and condition.
        schema: The source's schema.
        at: How the message names the place.

    Raises:
        UnknownColumnError: If it names a column that isn't there.
        ExpressionError: If it gives something other than numbers (or texts, where those are taken), or a
            condition that isn't true or false.
    """
    if given.column is not None and given.categories:
        _check_categories(given, column_type(given.column, schema, at=at), at)
    elif given.column is not None:
        dtype = column_type(given.column, schema, at=at)
        number = pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_boolean(dtype)
        plain_text = isinstance(given.column, str) and pa.types.is_string(dtype)
        if not (number or (given.texts and plain_text)):
            needed = "numbers, booleans or a column of texts" if given.texts else "numbers or booleans"
            raise ExpressionError(str(given.column), at, f"it gives {dtype}, and {needed} are needed")
    if given.where is not None:
        dtype = _result(given.where, schema, at)
        if not pa.types.is_boolean(dtype):
            raise ExpressionError(str(given.where), at, f"a condition gives true or false, this gives {dtype}")


def _check_categories(given: Input, dtype: pa.DataType, at: str) -> None:
    try:
        pa.array(given.categories, dtype)
        fits = pa.types.is_integer(dtype) or pa.types.is_string(dtype) or pa.types.is_large_string(dtype)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        fits = False
    if not fits:
        categories = ", ".join(repr(each) for each in given.categories)
        raise ExpressionError(
            str(given.column), at, f"it gives {dtype}, which can't hold the categories {categories}"
        )


def column_type(column: ColumnLike, schema: pa.Schema, *, at: str) -> pa.DataType:
    """The type of a column or expression.

    Raises:
        UnknownColumnError: If there is no such column.
        ExpressionError: If the expression can't be evaluated.
    """
    if not isinstance(column, str):
        return _result(column, schema, at)
    if column not in schema.names:
        raise UnknownColumnError(column, at, tuple(schema.names))
    return schema.field(column).type


def _result(expression: pc.Expression, schema: pa.Schema, at: str) -> pa.DataType:
    try:
        return _project(schema.empty_table(), {"result": expression})["result"].type
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowKeyError) as error:
        reason = str(error).splitlines()[0]
        known = f"; columns are: {', '.join(schema.names)}"
        raise ExpressionError(str(expression), at, reason + known) from None


def _project(events: pa.Table, expressions: Mapping[str, pc.Expression]) -> dict[str, pa.ChunkedArray]:
    if not expressions:
        return {}
    names = [f"c{position}" for position in range(len(expressions))]
    plan = acero.Declaration.from_sequence(
        [
            acero.Declaration("table_source", acero.TableSourceNodeOptions(events)),
            acero.Declaration("project", acero.ProjectNodeOptions(list(expressions.values()), names)),
        ]
    )
    projected = plan.to_table(use_threads=False)
    return {key: projected.column(name) for key, name in zip(expressions, names, strict=True)}


def _numbers(column: pa.ChunkedArray, *, nulls: bool) -> tuple[FloatArray, NDArray[np.bool_]]:
    values = _as_float(column)
    used = np.isfinite(values)
    if not nulls or used.all():
        return values, used
    return np.where(used, values, np.nan), np.ones(len(values), dtype=np.bool_)


def _members(column: pa.ChunkedArray, categories: Categories) -> tuple[FloatArray, NDArray[np.bool_]]:
    """2^position of each category; what is none of them isn't used."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    position = pc.fill_null(pc.index_in(column, value_set=pa.array(categories, column.type)), -1)
    found = position.combine_chunks().to_numpy(zero_copy_only=False)
    return np.ldexp(1.0, np.maximum(found, 0)), found >= 0


def _as_float(column: pa.ChunkedArray) -> FloatArray:
    """As float64 with NaN for null; texts as their codes."""
    texts = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_string(texts) or pa.types.is_large_string(texts):
        return text_codes(column)
    whole = column.combine_chunks()
    if not pa.types.is_floating(whole.type):
        whole = (
            whole.cast(pa.float64(), safe=False) if not pa.types.is_boolean(whole.type) else whole.cast(pa.uint8())
        )
    values: FloatArray = whole.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    return values


def _as_mask(column: pa.ChunkedArray) -> tuple[NDArray[np.bool_]]:
    filled = pc.fill_null(column, False).combine_chunks()
    return (filled.to_numpy(zero_copy_only=False).astype(np.bool_, copy=False),)


def text_of(part: ColumnLike | None) -> str | None:
    """A column or expression in words; None where there is none."""
    return None if part is None else part if isinstance(part, str) else f"({part})"
