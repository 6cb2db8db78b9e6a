"""Views whose vectors programs compute and write: embeddings, scores, a nightly job's totals. Pure.

A `PrecomputedView` is a view like any other over a source of its own. A written row is an event of
that source, so that everything that holds for events holds for vectors: they are in the event
log and in the rings, joined point in time by their own timestamps, taken exactly once, forgotten
and rebuilt with everything else. A row is one record: the newest one counts, its nulls included.

What makes two writes one: a row's id is a hash of its key, timestamp and values. Writing a row
again, online or offline, changes nothing; of two rows with one timestamp the larger hash wins,
whichever came first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.clock import format_instant
from heliostat.errors import InvalidDefinitionError, InvalidValueError, KeyColumnError, SchemaMismatchError
from heliostat.features.aggregations import FloatArray, Latest
from heliostat.features.definitions import Entity, EventSource, FeatureView, check_name
from heliostat.schema import TIMESTAMP, arrow_type, cast_column, hash64, times_us

COMPUTED_AT: Final = "computed_at"
ROW_ID: Final = "row_id"


class WrittenSource(EventSource):
    """The rows of one version of a `PrecomputedView`; its columns change with the view's version alone."""


class PrecomputedView(FeatureView):
    """Named, versioned features of one entity that programs compute and write.

    Args:
        name: Identifier.
        version: 1, 2, …; each version has rows of its own.
        entity: What the vectors describe.
        features: Names of the vectors' columns; a mapping gives each a description.
        ttl: A vector older than this is absent; None: never.
        tags: Free labels for search.
        owner: Who answers for it.
        description: One line for the registry.

    Raises:
        DefinitionError: If anything doesn't fit; the message says what exists.
    """

    def __init__(
        self,
        name: str,
        *,
        version: int,
        entity: Entity,
        features: Sequence[str] | Mapping[str, str],
        ttl: str | None = None,
        tags: Mapping[str, str] | None = None,
        owner: str = "",
        description: str = "",
    ) -> None:
        at = f"feature view {name!r}"
        check_name(name, "PrecomputedView")
        described = dict(features) if isinstance(features, Mapping) else dict.fromkeys(features, "")
        for feature in described:
            if feature in (COMPUTED_AT, ROW_ID, *entity.key_columns):
                fix = f"{COMPUTED_AT}, {ROW_ID} and the keys are columns of every row"
                raise InvalidDefinitionError(at, f"{feature!r} can't be a feature's name", fix)
        columns = [
            *((column, arrow_type(dtype)) for column, dtype in entity.keys.items()),
            (COMPUTED_AT, TIMESTAMP),
            (ROW_ID, pa.int64()),
            *((feature, pa.float64()) for feature in described),
        ]
        source = WrittenSource(
            f"{name}_v{version}",
            schema=pa.schema(columns),
            entity=entity,
            event_time=COMPUTED_AT,
            event_id=ROW_ID,
            description=f"Rows that programs write for {name}@{version}",
        )
        super().__init__(
            name,
            version=version,
            source=source,
            features={feature: Latest(feature, description=text) for feature, text in described.items()},
            ttl=ttl,
            tags=tags,
            owner=owner,
            description=description,
        )

    def rows(self, table: pa.Table, at: str | int, *, newest_us: int, what: str = "the frame") -> pa.Table:
        """Written vectors as events of the view's source.

        Args:
            table: Key columns and features, by name or as ``view__feature``; and the timestamps.
            at: The column of timestamps, or one instant for all rows, microseconds.
            newest_us: No timestamp may lie after this instant, microseconds.
            what: How messages name the table.

        Returns:
            Columns of the source, in the table's order.

        Raises:
            SchemaMismatchError: If a column is missing, unknown, or has a type that isn't its own.
            KeyColumnError: If a key or timestamp is null.
            InvalidValueError: If a value is infinite or a timestamp too late.
        """
        named = self._by_name(table, at, what)
        keys = self.entity.encode(named, what=what)
        columns = {column: named.column(column) for column in self.entity.key_columns}
        columns[COMPUTED_AT] = self._times(named, at, newest_us, what)
        for feature in self.base_features:
            columns[feature] = self._values(named, feature, what)
        columns[ROW_ID] = _row_ids(keys, columns[COMPUTED_AT], [columns[name] for name in self.base_features])
        casts = {field.name: cast_column(_chunked(columns[field.name]), field.type) for field in self.source.schema}
        return pa.table(casts, schema=self.source.schema)

    def _by_name(self, table: pa.Table, at: str | int, what: str) -> pa.Table:
        """The table with features named as in the view; refuses columns that are missing or nobody knows."""
        qualified = {f"{prefix}__{name}": name for name in self.base_features for prefix in (self.name, self.ref)}
        names = [qualified.get(name, name) for name in table.column_names]
        wanted = [*self.entity.key_columns, *([at] if isinstance(at, str) else []), *self.base_features]
        problems = [f"column {name!r} is missing" for name in wanted if name not in names]
        problems += [f"column {name!r} is unknown" for name in names if name not in wanted]
        problems += [f"column {name!r} is there twice" for name in dict.fromkeys(names) if names.count(name) > 1]
        if problems:
            raise SchemaMismatchError(f"{what} for {self.ref}", tuple(problems), ", ".join(wanted))
        return table.rename_columns(names)

    def _times(self, table: pa.Table, at: str | int, newest_us: int, what: str) -> pa.Array:
        if isinstance(at, str):
            column = table.column(at)
            if column.null_count:
                problem = f"is null in {column.null_count} rows"
                raise KeyColumnError(at, what, problem, tuple(table.column_names))
            try:
                instants = times_us(cast_column(column, TIMESTAMP))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
                problem = f"column {at!r} is {column.type}, and no instants in whole microseconds"
                fix = (
                    "timestamps or int64 microseconds, UTC; round nanoseconds up: rounded down, they leak the future"
                )
                raise SchemaMismatchError(f"{what} for {self.ref}", (problem,), fix) from None
        else:
            instants = np.full(table.num_rows, at)
        if len(instants) and instants.max() > newest_us:
            late = format_instant(int(instants.max()))
            raise InvalidValueError(f"timestamp of {self.ref}", late, f"one up to {format_instant(newest_us)}")
        return pa.array(instants, pa.int64()).cast(TIMESTAMP)

    def _values(self, table: pa.Table, feature: str, what: str) -> pa.Array:
        column = table.column(feature).combine_chunks()
        dtype = column.type
        if pa.types.is_boolean(dtype):
            column = column.cast(pa.uint8())
        elif not (
            pa.types.is_integer(dtype)
            or pa.types.is_floating(dtype)
            or pa.types.is_decimal(dtype)
            or pa.types.is_null(dtype)
        ):
            problem = f"column {feature!r} is {dtype}"
            raise SchemaMismatchError(f"{what} for {self.ref}", (problem,), "numbers, booleans or nulls")
        try:
            values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid as error:
            problem = f"column {feature!r} holds integers that no float64 can ({str(error).splitlines()[0]})"
            raise SchemaMismatchError(f"{what} for {self.ref}", (problem,), "numbers below 2**53") from None
        infinite = int(np.isinf(values).sum())
        if infinite:
            expected = "finite numbers; null is what isn't known"
            raise InvalidValueError(f"feature {feature!r} of {self.ref}", f"±Inf in {infinite} rows", expected)
        return pa.array(values + 0.0, from_pandas=True)


def _chunked(column: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])


def _row_ids(keys: pa.Array, times: pa.Array, values: Sequence[pa.Array]) -> pa.Array:
    """A 64-bit hash of each row: equal rows have equal ids, on every machine and for ever."""
    mixed = hash64(keys)
    for part in (times_us(times), *(_bits(column) for column in values)):
        mixed = hash64(pa.array((mixed ^ hash64(pa.array(part))).view(np.int64)))
    return pa.array(mixed.view(np.int64))


def _bits(column: pa.Array) -> NDArray[np.int64]:
    """A column's values as integers; null is NaN, and there is one NaN."""
    values: FloatArray = column.to_numpy(zero_copy_only=False).astype(np.float64)
    values[np.isnan(values)] = np.nan
    return values.view(np.int64)
