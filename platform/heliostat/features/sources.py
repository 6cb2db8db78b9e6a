"""What features are about and where they come from: entities and sources. Pure; loads no Ray.

Part of the declaring vocabulary; see `heliostat.features.definitions`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final, Literal
from urllib.parse import quote, unquote

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.errors import InvalidDefinitionError, InvalidValueError, KeyColumnError, UnknownColumnError
from heliostat.schema import arrow_type, bucket_of, cast_column, describe_schema, hash64, normalized

ROW_ID: Final = "row_id"
"""The column that names a row of a source whose rows aren't named by whoever sends them."""

_SURELY_64_BITS = 18
"""Digits."""

KeyType = Literal["int64", "string"]
EntityKey = int | str | Mapping[str, int | str]
"""One entity's key as users write it: a scalar, or a mapping of key columns."""


def check_name(name: str, what: str) -> str:
    """Refuse a name that couldn't be part of a key, a path or a column.

    Raises:
        InvalidDefinitionError: If it isn't a plain identifier, or holds a double underscore.
    """
    if not isinstance(name, str) or not name.isidentifier() or "__" in name or name.startswith("_"):
        raise InvalidDefinitionError(
            what,
            f"{name!r} is no usable name",
            "use letters, digits and single underscores, such as user_features",
        )
    return name


def content_hash(document: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON document in canonical form, as hexadecimal digits."""
    return hashlib.sha256(orjson.dumps(document, option=orjson.OPT_SORT_KEYS)).hexdigest()


class Entity:
    """What features describe: a user, a product, an account and its device.

    Args:
        name: Identifier.
        keys: Key columns and their types, ``{"customer_id": "int64"}``.
        description: One line for the registry.

    Raises:
        InvalidDefinitionError: If there is no key column, or a type isn't ``int64`` or ``string``.
    """

    def __init__(self, name: str, *, keys: Mapping[str, KeyType], description: str = "") -> None:
        self.name = check_name(name, "Entity")
        if not keys:
            raise InvalidDefinitionError(f"entity {name!r}", "it has no key", 'write keys={"user_id": "int64"}')
        for column, dtype in keys.items():
            check_name(column, f"entity {name!r}: key")
            if dtype not in ("int64", "string"):
                raise InvalidDefinitionError(
                    f"entity {name!r}", f"key {column!r} has type {dtype!r}", "keys are int64 or string"
                )
        self.keys: dict[str, KeyType] = dict(keys)
        self.description = description

    def __repr__(self) -> str:
        return f"Entity({self.name!r}, keys={self.keys!r})"

    @property
    def key_columns(self) -> tuple[str, ...]:
        """The key columns, in declared order."""
        return tuple(self.keys)

    @cached_property
    def has_integer_key(self) -> bool:
        """Whether the key is one integer: then encoded keys are int64, otherwise text."""
        return list(self.keys.values()) == ["int64"]

    @property
    def encoded_type(self) -> pa.DataType:
        """The Arrow type of encoded keys."""
        return pa.int64() if self.has_integer_key else pa.string()

    def describe(self) -> dict[str, Any]:
        """A JSON document with all that its meaning depends on."""
        return {"name": self.name, "keys": [[column, dtype] for column, dtype in self.keys.items()]}

    @property
    def content_hash(self) -> str:
        """Changes if and only if the meaning does."""
        return content_hash(self.describe())

    def encode(self, table: pa.Table, *, what: str = "the table") -> pa.Array:
        """The canonical keys of a table's rows.

        Args:
            table: Has the key columns, none of them null.
            what: How messages name the table.

        Returns:
            int64 for one integer key, otherwise string; several keys are joined by ``|``.

        Raises:
            KeyColumnError: If a key column is missing, null or of the wrong type.
        """
        parts = [self._key_column(table, column, what) for column in self.keys]
        if len(parts) == 1:
            return parts[0]
        texts = [_escaped(part) for part in parts]
        return pc.binary_join_element_wise(*texts, "|")

    def _key_column(self, table: pa.Table, column: str, what: str) -> pa.Array:
        if column not in table.column_names:
            raise KeyColumnError(column, what, "is missing", tuple(table.column_names))
        try:
            cast = cast_column(table.column(column), arrow_type(self.keys[column])).combine_chunks()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
            found = table.schema.field(column).type
            problem = f"is {found}, not {self.keys[column]}"
            raise KeyColumnError(column, what, problem, tuple(table.column_names)) from None
        if cast.null_count:
            raise KeyColumnError(column, what, f"is null in {cast.null_count} rows", tuple(table.column_names))
        return cast

    def text(self, key: EntityKey) -> str:
        """One key as text: what the online store's keys, URLs and logs show.

        Raises:
            InvalidValueError: If the key has the wrong type or lacks a part.
        """
        if isinstance(key, Mapping):
            missing = [column for column in self.keys if column not in key]
            if missing or len(key) != len(self.keys):
                raise InvalidValueError(f"key of entity {self.name!r}", str(dict(key)), f"the keys {list(self.keys)}")
            parts = [self._part(column, key[column]) for column in self.keys]
        elif len(self.keys) == 1:
            parts = [self._part(next(iter(self.keys)), key)]
        else:
            return "|".join(quote(unquote(part), safe="") for part in self._split(str(key)))
        return parts[0] if len(parts) == 1 else "|".join(quote(part, safe="") for part in parts)

    def texts(self, keys: Sequence[EntityKey]) -> list[str]:
        """Many keys as text; see `text`."""
        if self.has_integer_key and {*map(type, keys)} == {int}:
            # Most keys: no look at each one's parts, and no call of `str` for each.
            try:
                texts = orjson.dumps(keys)[1:-1].decode().split(",")
            except orjson.JSONEncodeError:  # too large for 64 bits
                texts = []
            if texts and max(map(len, texts)) <= _SURELY_64_BITS:
                return texts
        return [self.text(key) for key in keys]

    def _part(self, column: str, value: int | str) -> str:
        if self.keys[column] == "int64":
            try:
                number = int(value) if not isinstance(value, bool | float) else None
            except (TypeError, ValueError):
                number = None
            if number is None or not -(2**63) <= number < 2**63:
                raise InvalidValueError(f"key {column!r} of entity {self.name!r}", str(value), "an integer")
            return str(number)
        if not isinstance(value, str) or not value:
            raise InvalidValueError(f"key {column!r} of entity {self.name!r}", str(value), "a text that isn't empty")
        return value

    def _split(self, text: str) -> list[str]:
        parts = text.split("|")
        if len(parts) != len(self.keys):
            raise InvalidValueError(f"key of entity {self.name!r}", text, f"{len(self.keys)} parts joined by |")
        return parts

    def parse(self, text: str) -> dict[str, int | str]:
        """The key columns of a key's text; the reverse of `text`.

        Raises:
            InvalidValueError: If the text is no key of this entity.
        """
        parts = [text] if len(self.keys) == 1 else [unquote(part) for part in self._split(text)]
        return {
            column: int(self._part(column, part)) if dtype == "int64" else part
            for (column, dtype), part in zip(self.keys.items(), parts, strict=True)
        }

    def encoded(self, texts: Sequence[str]) -> pa.Array:
        """Encoded keys of texts: what `encode` gives for the same entities."""
        return pa.array([int(text) for text in texts] if self.has_integer_key else list(texts), self.encoded_type)

    def buckets(self, encoded: pa.Array, n_buckets: int) -> NDArray[np.int32]:
        """The bucket of each encoded key.

        Args:
            encoded: What `encode` gives, length ``n``.
            n_buckets: The event log's number of buckets.

        Returns:
            Shape ``(n,)``.
        """
        return bucket_of(hash64(encoded), n_buckets)


def _escaped(part: pa.Array) -> pa.Array:
    if pa.types.is_integer(part.type):
        return part.cast(pa.string())
    distinct = part.dictionary_encode()
    return pa.array([quote(text, safe="") for text in distinct.dictionary.to_pylist()], pa.string()).take(
        distinct.indices
    )


class EventSource:
    """A stream of events about entities.

    Args:
        name: Identifier.
        schema: Arrow schema of an event, keys included; timestamps without a zone are UTC.
        entity: The entity it is about, or several; each one's key columns are in the schema.
        event_time: The timestamp column.
        event_id: The column (string or integer) that names an event: the same id twice is one event.
        description: One line for the registry.

    Raises:
        UnknownColumnError: If a named column isn't in the schema.
        InvalidDefinitionError: If a column has a type that can't serve.
    """

    def __init__(
        self,
        name: str,
        *,
        schema: pa.Schema,
        entity: Entity | Sequence[Entity],
        event_time: str,
        event_id: str,
        description: str = "",
    ) -> None:
        self.name = check_name(name, "EventSource")
        at = f"event source {name!r}"
        self.schema = normalized(schema)
        self.entities: tuple[Entity, ...] = (entity,) if isinstance(entity, Entity) else tuple(entity)
        self.event_time, self.event_id, self.description = event_time, event_id, description
        if not self.entities:
            raise InvalidDefinitionError(at, "it is about no entity", "name at least one: entity=user")
        for column in (event_time, event_id, *(key for each in self.entities for key in each.keys)):
            if column not in self.schema.names:
                raise UnknownColumnError(column, at, tuple(self.schema.names))
        for column in self.schema.names:
            if column.startswith("_"):
                raise InvalidDefinitionError(
                    at,
                    f"column {column!r} starts with an underscore",
                    "rename it: those names are the event log's",
                )
        if not pa.types.is_timestamp(self.schema.field(event_time).type):
            raise InvalidDefinitionError(
                at,
                f"event time {event_time!r} is {self.schema.field(event_time).type}",
                "declare it a pa.timestamp",
            )
        for column in (event_id, *(key for each in self.entities for key in each.keys)):
            dtype = self.schema.field(column).type
            if not (pa.types.is_string(dtype) or pa.types.is_int64(dtype)):
                raise InvalidDefinitionError(at, f"{column!r} is {dtype}", "keys and ids are integers or strings")
        for each in self.entities:
            for column, dtype_name in each.keys.items():
                if self.schema.field(column).type != arrow_type(dtype_name):
                    raise InvalidDefinitionError(
                        at,
                        f"{column!r} is {self.schema.field(column).type}",
                        f"entity {each.name!r} says {dtype_name}",
                    )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {describe_schema(self.schema)})"

    @property
    def given_schema(self) -> pa.Schema:
        """The columns that whoever sends events gives; `identified` adds the others."""
        return self.schema

    def identified(self, events: pa.Table) -> pa.Table:
        """Events with all columns, made of those with the columns of `given_schema`."""
        return events

    def describe(self) -> dict[str, Any]:
        """A JSON document with all that its meaning depends on."""
        return {
            "name": self.name,
            "schema": [[field.name, str(field.type)] for field in self.schema],
            "entities": [each.describe() for each in self.entities],
            "event_time": self.event_time,
            "event_id": self.event_id,
        }

    @property
    def content_hash(self) -> str:
        """Changes if and only if the meaning does."""
        return content_hash(self.describe())


class ProfileSource(EventSource):
    """A stream of records that replace each other: what is known about an entity, and since when.

    A view over it asks for ``Latest("country")``: the value of the newest row before the instant, null if
    that row says null. Rows come in like events, in bulk and live, in any order.

    A row is named by its entity and the instant it holds from, so it needs no id of its own: the same pair
    twice is one row, and the first that came stays. A correction is a row with a later instant.

    Args:
        name: Identifier.
        schema: Arrow schema of a row, keys included; timestamps without a zone are UTC.
        entity: The entity it is about.
        updated_at: The timestamp column: from when on a row holds.
        description: One line for the registry.

    Raises:
        UnknownColumnError: If a named column isn't in the schema.
        InvalidDefinitionError: If a column has a type that can't serve, or the name that rows' ids have.
    """

    def __init__(
        self, name: str, *, schema: pa.Schema, entity: Entity, updated_at: str, description: str = ""
    ) -> None:
        if ROW_ID in schema.names:
            raise InvalidDefinitionError(
                f"profile source {name!r}", f"column {ROW_ID!r} is made from key and instant", "rename yours"
            )
        super().__init__(
            name,
            schema=schema.append(pa.field(ROW_ID, pa.string())),
            entity=entity,
            event_time=updated_at,
            event_id=ROW_ID,
            description=description,
        )

    @property
    def given_schema(self) -> pa.Schema:
        """The schema without rows' ids."""
        return pa.schema([field for field in self.schema if field.name != ROW_ID])

    def identified(self, events: pa.Table) -> pa.Table:
        """Rows with their ids."""
        columns = [
            *(events.column(column).cast(pa.string()) for column in self.entities[0].key_columns),
            events.column(self.event_time).cast(pa.int64()).cast(pa.string()),
        ]
        # Lengths in front: no two keys of several columns give one text.
        lengths = [pc.utf8_length(column).cast(pa.string()) for column in columns[:-1]]
        return pa.table([*events.columns, pc.binary_join_element_wise(*lengths, *columns, "|")], schema=self.schema)

    def describe(self) -> dict[str, Any]:
        """A JSON document with all that its meaning depends on."""
        return {**super().describe(), "kind": "profile"}
