"""Tables of callers: pandas, Arrow or Ray Data in, the same kind out. Pure: it never starts Ray."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import pyarrow as pa

from heliostat.errors import InvalidValueError, SpineError
from heliostat.features.aggregations import FloatArray
from heliostat.features.definitions import Entity

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


def like(frame: object, table: pa.Table) -> Any:  # noqa: ANN401 - a pandas frame or an Arrow table
    """A table as the kind that a frame is of."""
    return table.to_pandas() if isinstance(frame, pd.DataFrame) else table


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
    return cast("Frame", cast("Any", frame).assign(**columns))


def keys_frame(entities: object, described: Mapping[str, Entity]) -> pd.DataFrame | pa.Table:
    """Whoever was asked for, as a frame with key columns.

    Args:
        entities: Such a frame; or keys of one entity: a list, an array, a Series, or an Arrow array.
        described: The entities that are looked up, by name.

    Returns:
        The frame itself; or a new one: Arrow's for Arrow's arrays, otherwise pandas'.

    Raises:
        InvalidValueError: If keys are given without a frame though several entities are looked up.
    """
    if isinstance(entities, pd.DataFrame | pa.Table):
        return entities
    if len(described) != 1:
        raise InvalidValueError("entities", type(entities).__name__, f"a frame with the keys of {sorted(described)}")
    entity = next(iter(described.values()))
    if isinstance(entities, pa.Array | pa.ChunkedArray):
        if len(entity.keys) == 1:
            return pa.table({entity.key_columns[0]: entities})
        return _parsed(entity, entities.to_pylist())
    if isinstance(entities, pd.Series) and len(entity.keys) == 1:
        return entities.to_frame(entity.key_columns[0])
    if isinstance(entities, str | bytes) or not isinstance(entities, Sequence | np.ndarray | pd.Series | pd.Index):
        raise InvalidValueError("entities", type(entities).__name__, "a list of keys, or a frame with key columns")
    return _parsed(entity, list(entities)).to_pandas()


def _parsed(entity: Entity, keys: Sequence[Any]) -> pa.Table:
    rows = [entity.parse(entity.text(key)) for key in keys]
    return pa.table({column: pa.array([row[column] for row in rows], type_) for column, type_ in _types(entity)})


def _types(entity: Entity) -> list[tuple[str, pa.DataType]]:
    return [(column, pa.int64() if dtype == "int64" else pa.string()) for column, dtype in entity.keys.items()]
