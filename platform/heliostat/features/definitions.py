"""What users declare: entities, event sources and feature views. Pure; loads no Ray.

Every declaration validates itself when it is constructed, says what exists when
something doesn't, and has a content hash that changes if and only if its meaning does.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote, unquote

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.clock import format_duration, parse_duration_us
from heliostat.errors import (
    DuplicateNameError,
    InvalidDefinitionError,
    InvalidValueError,
    KeyColumnError,
    UnknownColumnError,
    UnknownFeatureError,
)
from heliostat.features.aggregations import Aggregation, FloatArray, Input, check_input
from heliostat.schema import arrow_type, bucket_of, cast_column, describe_schema, hash64, normalized

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

    @property
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
        return f"EventSource({self.name!r}, {describe_schema(self.schema)})"

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


@dataclass(frozen=True, eq=False)
class DerivedFeature:
    """A feature computed from other features of its view.

    Attributes:
        name: Identifier.
        inputs: Names of features of the same view: the function's parameters.
        function: Takes float64 arrays of shape ``(n,)``, gives one; the same online and offline.
    """

    name: str
    inputs: tuple[str, ...]
    function: Callable[..., FloatArray]

    def __call__(self, columns: Mapping[str, FloatArray]) -> FloatArray:
        """Compute from columns by feature name, shape ``(n,)`` each."""
        with np.errstate(all="ignore"):
            values = self.function(*(columns[name] for name in self.inputs))
        return np.asarray(values, dtype=np.float64)

    def describe(self) -> dict[str, Any]:
        """A JSON document with all that the value depends on: the function's code, not its comments."""
        try:
            source = textwrap.dedent(inspect.getsource(self.function))
        except (OSError, TypeError):
            raise InvalidDefinitionError(
                f"derived feature {self.name!r}",
                "its source code can't be read",
                "define it in a module's file",
            ) from None
        tree = ast.parse(source).body[0]
        if isinstance(tree, ast.FunctionDef):
            tree.decorator_list = []
            if ast.get_docstring(tree) is not None:
                tree.body = tree.body[1:]
        return {"function": "derived", "inputs": list(self.inputs), "code": ast.unparse(tree)}


@dataclass(frozen=True, eq=False)
class FeatureRef:
    """One feature of one view, as a model names it.

    Attributes:
        view: The view that defines it.
        feature: Its name there.
    """

    view: FeatureView
    feature: str

    @property
    def name(self) -> str:
        """The qualified name: ``view__feature``."""
        return f"{self.view.name}__{self.feature}"


class FeatureView:
    """Named, versioned features of one entity, computed from one source.

    Args:
        name: Identifier.
        version: 1, 2, …; a changed meaning needs a higher one.
        source: Where the events come from.
        features: Aggregations by feature name.
        entity: Needed if the source is about several.
        where: Only events that meet this expression count, for all features.
        hop: Tile length for all windows; by default it follows from each window.
        ttl: A vector whose last event is older than this is absent; None: never.
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
        source: EventSource,
        features: Mapping[str, Aggregation],
        entity: Entity | None = None,
        where: pc.Expression | None = None,
        hop: str | None = None,
        ttl: str | None = None,
        tags: Mapping[str, str] | None = None,
        owner: str = "",
        description: str = "",
    ) -> None:
        self.name = check_name(name, "FeatureView")
        at = f"feature view {name!r}"
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise InvalidDefinitionError(at, f"version {version!r} is no version", "count from 1")
        if not features:
            raise InvalidDefinitionError(
                at, "it has no features", 'write features={"purchases_30d": Count(window="30d")}'
            )
        self.version, self.source = version, source
        self.entity = self._chosen_entity(source, entity, at)
        self.hop_us = None if hop is None else parse_duration_us(hop)
        self.ttl_us = None if ttl is None else parse_duration_us(ttl)
        self.where = where
        self.tags, self.owner, self.description = dict(tags or {}), owner, description
        self.base_features: dict[str, Aggregation] = {}
        for feature, aggregation in features.items():
            place = f"feature {name}.{feature}"
            check_name(feature, place)
            if not isinstance(aggregation, Aggregation):
                raise InvalidDefinitionError(place, f"{aggregation!r} is no aggregation", 'write Count(window="30d")')
            bound = aggregation.bound(where=where, hop_us=self.hop_us, at=place)
            check_input(bound.input, source.schema, at=place)
            self.base_features[feature] = bound
        self.derived_features: dict[str, DerivedFeature] = {}

    @staticmethod
    def _chosen_entity(source: EventSource, entity: Entity | None, at: str) -> Entity:
        if entity is None and len(source.entities) == 1:
            return source.entities[0]
        names = [each.name for each in source.entities]
        if entity is None:
            raise InvalidDefinitionError(at, f"source {source.name!r} is about {names}", "say which: entity=…")
        if entity.name not in names:
            raise InvalidDefinitionError(at, f"source {source.name!r} isn't about {entity.name!r}", f"it has {names}")
        return entity

    def __repr__(self) -> str:
        return f"FeatureView({self.ref!r}, features={list(self.feature_names)})"

    def __getitem__(self, feature: str) -> FeatureRef:
        if feature not in self:
            raise UnknownFeatureError(feature, self.name, self.feature_names)
        return FeatureRef(self, feature)

    def __contains__(self, feature: object) -> bool:
        return feature in self.base_features or feature in self.derived_features

    def __iter__(self) -> Iterator[FeatureRef]:
        return (FeatureRef(self, feature) for feature in self.feature_names)

    def derived(self, function: Callable[..., FloatArray]) -> Callable[..., FloatArray]:
        """Add a feature computed from features of this view: a decorator.

        The function's name is the feature's; its parameters name features of this view. It takes
        and gives float64 arrays of shape ``(n,)`` and runs unchanged offline and online.

        Raises:
            DuplicateNameError: If the view has a feature of that name.
            UnknownFeatureError: If a parameter names none of the view's features.
        """
        name = check_name(function.__name__, f"feature view {self.name!r}")
        if name in self:
            raise DuplicateNameError("feature", name, f"feature view {self.name!r}")
        inputs = tuple(inspect.signature(function).parameters)
        for each in inputs:
            if each not in self:
                raise UnknownFeatureError(each, self.name, self.feature_names)
        self.derived_features[name] = DerivedFeature(name, inputs, function)
        return function

    @property
    def ref(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Aggregated features, then derived ones, in declared order."""
        return (*self.base_features, *self.derived_features)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What its aggregations look at, each once."""
        return tuple({each.input.key: each.input for each in self.base_features.values()}.values())

    @property
    def max_window_us(self) -> int | None:
        """The longest window; None if a feature or the ttl looks at all of the past."""
        if self.has_lifetime:
            return None
        return max(each.window_us for each in self.base_features.values() if each.window_us is not None)

    @property
    def has_lifetime(self) -> bool:
        """Whether some feature has no window, or a ttl asks for the last event."""
        return self.ttl_us is not None or any(each.window is None for each in self.base_features.values())

    def derive(self, columns: dict[str, FloatArray], *, given: frozenset[str] = frozenset()) -> None:
        """Add the derived features to the aggregated ones, in place.

        Args:
            columns: Arrays of shape ``(n,)`` by feature name.
            given: Derived features that are there already and stay.
        """
        for name, feature in self.derived_features.items():
            if name not in given:
                columns[name] = feature(columns)

    def describe(self) -> dict[str, Any]:
        """A JSON document with all that its values depend on."""
        return {
            "name": self.name,
            "version": self.version,
            "source": self.source.describe(),
            "entity": self.entity.name,
            "ttl": None if self.ttl_us is None else format_duration(self.ttl_us),
            "features": {name: each.describe() for name, each in self.base_features.items()},
            "derived": {name: each.describe() for name, each in self.derived_features.items()},
        }

    @property
    def content_hash(self) -> str:
        """Changes if and only if the meaning does; tags, owner and description don't count."""
        return content_hash(self.describe())
