"""Tables of callers: pandas, Arrow or Ray Data in, the same kind out. Pure: it never starts Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar, cast

import numpy as np
import pandas as pd
import pyarrow as pa

from heliostat.errors import InvalidValueError, SpineError
from heliostat.features.aggregations import FloatArray
from heliostat.features.definitions import Entity
from heliostat.schema import arrow_type

Frame = TypeVar("Frame")
BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]

_KINDS = "give a pandas frame, an Arrow table or a Ray Dataset"


def is_dataset(frame: object) -> bool:
    """Whether it is a Ray Dataset; doesn't load Ray to find out."""
    data = sys.modules.get("ray.data")
    return data is not None and isinstance(frame, data.Dataset)


def ray_is_connected() -> bool:
    """Whether this process is part of a Ray cluster; doesn't load Ray to find out."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def as_table(frame: object, *, what: str = "the frame") -> pa.Table:
    """A pandas frame or an Arrow table as an Arrow table; an index isn't part of it.

    Raises:
        SpineError: If it is something else, or has columns that Arrow can't hold.
    """
    if isinstance(frame, pa.Table):
        return frame
    if isinstance(frame, pa.RecordBatch):
        return pa.Table.from_batches([frame])
    if not isinstance(frame, pd.DataFrame):
        raise SpineError(f"is a {type(frame).__name__}", _KINDS, (), what)
    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        columns = tuple(str(name) for name in frame.columns)
        reason = str(error).splitlines()[0]
        raise SpineError(
            f"has values of mixed types ({reason})", "give each column one type", columns, what
        ) from None


def some_columns(frame: object, names: Iterable[str], *, what: str = "the frame") -> pa.Table:
    """Those of some columns that a frame has, as an Arrow table: the others may hold whatever they like."""
    if not isinstance(frame, pd.DataFrame):
        return as_table(frame, what=what)
    return as_table(frame[[name for name in dict.fromkeys(names) if name in frame.columns]], what=what)


def with_columns(frame: Frame, columns: Mapping[str, FloatArray | BoolArray], *, what: str = "the frame") -> Frame:
    """A frame with more columns; of pandas, its own ones and its index stay as they are.

    Raises:
        SpineError: If it has a column of such a name.
    """
    known = frame.column_names if isinstance(frame, pa.Table) else list(cast("Any", frame).columns)
    for name in columns:
        if name in known:
            raise SpineError(f"has a column {name!r} already", "drop or rename it", tuple(map(str, known)), what)
    if isinstance(frame, pa.Table):
        added = pa.table([*frame.columns, *map(pa.array, columns.values())], names=[*known, *columns])
        return cast("Frame", added)
    own = cast("pd.DataFrame", frame)
    return cast("Frame", pd.concat([own, pd.DataFrame(dict(columns), index=own.index)], axis=1))


@dataclass(frozen=True, eq=False)
class Asked:
    """Whoever was asked for, and how to answer in the same kind.

    Attributes:
        table: The columns that are needed of them: keys first of all.
        given: The frame that was given; None for keys without a frame.
        is_pandas: Whether the answer is a pandas frame.
    """

    table: pa.Table
    given: pd.DataFrame | pa.Table | None
    is_pandas: bool

    @classmethod
    def of(cls, entities: object, described: Mapping[str, Entity], also: Iterable[str] = ()) -> Self:
        """Read what was given.

        Args:
            entities: A frame with key columns; or keys of one entity: a list, an array, a Series, or an Arrow array.
            described: The entities that are looked up, by name.
            also: Further columns that are looked at, if a frame has them.

        Raises:
            InvalidValueError: If keys are given without a frame though several entities are looked up.
            SpineError: If a frame can't be read.
        """
        if isinstance(entities, pa.Table):
            return cls(entities, entities, is_pandas=False)
        if isinstance(entities, pd.DataFrame):
            keys = (column for entity in described.values() for column in entity.key_columns)
            return cls(some_columns(entities, (*keys, *also)), entities, is_pandas=True)
        if len(described) != 1:
            kind = type(entities).__name__
            raise InvalidValueError("entities", kind, f"a frame with the keys of {sorted(described)}")
        entity = next(iter(described.values()))
        if isinstance(entities, pa.Array | pa.ChunkedArray):
            return cls(_keys(entity, entities.to_pylist()), None, is_pandas=False)
        if isinstance(entities, str | bytes) or not isinstance(
            entities, Sequence | np.ndarray | pd.Series | pd.Index
        ):
            expected = "a list of keys, or a frame with key columns"
            raise InvalidValueError("entities", type(entities).__name__, expected)
        keys_given = list(entities) if isinstance(entities, Sequence) else entities.tolist()
        return cls(_keys(entity, keys_given), None, is_pandas=True)

    def answer(self, columns: Mapping[str, FloatArray | BoolArray]) -> Any:  # noqa: ANN401 - as given
        """What was given, with more columns; shape ``(n,)`` each."""
        if self.given is not None:
            return with_columns(self.given, columns)
        if not self.is_pandas:
            return with_columns(self.table, columns)
        keys = {name: self.table.column(name).to_numpy() for name in self.table.column_names}
        return pd.DataFrame({**keys, **columns})

    def like(self, table: pa.Table) -> Any:  # noqa: ANN401 - as given
        """A table as the kind that was given."""
        return table.to_pandas() if self.is_pandas else table


def _keys(entity: Entity, keys: Sequence[Any]) -> pa.Table:
    texts = entity.texts(keys)
    if len(entity.keys) == 1:
        return pa.table({entity.key_columns[0]: entity.encoded(texts)})
    rows = [entity.parse(text) for text in texts]
    return pa.table(
        {column: pa.array([row[column] for row in rows], arrow_type(dtype)) for column, dtype in entity.keys.items()}
    )
