"""What users declare: entities, sources and feature views. Pure; loads no Ray.

Every declaration validates itself when it is constructed, says what exists when
something doesn't, and has a content hash that changes if and only if its meaning does.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from heliostat.clock import format_duration, parse_duration_us
from heliostat.errors import DuplicateNameError, InvalidDefinitionError, UnknownFeatureError
from heliostat.features.aggregations import Aggregation, FloatArray, Input, check_input
from heliostat.features.inputs import column_type
from heliostat.features.request import REQUEST_TYPES, RequestType, RequestTypes, merged_types
from heliostat.features.sources import (
    Entity,
    EntityKey,
    EventSource,
    KeyType,
    ProfileSource,
    check_name,
    content_hash,
)

__all__ = [
    "DerivedFeature",
    "Entity",
    "EntityKey",
    "EventSource",
    "FeatureRef",
    "FeatureView",
    "FloatArray",
    "KeyType",
    "ProfileSource",
    "check_name",
    "content_hash",
    "request_types",
]


@dataclass(frozen=True, eq=False)
class DerivedFeature:
    """A feature computed from other features of its view, and from what a request brings.

    Attributes:
        name: Identifier.
        inputs: The function's parameters: names of features and of request inputs of the same view.
        function: Takes float64 arrays of shape ``(n,)``, gives one; the same online and offline. It can't write
            into what it takes: those are other features' values.
        request: Those parameters that only a request or a spine has, with their types.
    """

    name: str
    inputs: tuple[str, ...]
    function: Callable[..., FloatArray]
    request: RequestTypes = field(default_factory=dict)

    def __call__(self, columns: Mapping[str, FloatArray]) -> FloatArray:
        """Compute from columns by the name of feature or request input, shape ``(n,)`` each.

        Raises:
            ValueError: If the function writes into one of them.
        """
        with np.errstate(all="ignore"):
            values = self.function(*(_read_only(columns[name]) for name in self.inputs))
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
        document = {"function": "derived", "inputs": list(self.inputs), "code": ast.unparse(tree)}
        return {**document, "request": dict(self.request)} if self.request else document


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
        return f"{self.view.prefix}__{self.feature}"


class FeatureView:
    """Named, versioned features of one entity, computed from one source.

    Args:
        name: Identifier.
        version: 1, 2, …; a changed meaning needs a higher one.
        source: Where the events come from.
        features: Aggregations by feature name; one with several windows makes a feature of each,
            ``spend`` becomes ``spend_7d`` and ``spend_30d``.
        entity: Needed if the source is about several.
        request: What derived features take from the request, and in training from a column of the spine:
            type (``float64``, ``int64`` or ``bool``) by name.
        where: Only events that meet this expression count, for all features.
        hop: Tile length for all windows; by default it follows from each window.
        ttl: A vector whose last event is older than this is absent; None: never.
        tags: Free labels for search.
        owner: Who answers for it.
        description: One line for the registry.

    Attributes:
        prefix: What its columns' names begin with: its name, or of a `pinned` view its reference.

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
        request: RequestTypes | None = None,
        where: pc.Expression | None = None,
        hop: str | None = None,
        ttl: str | None = None,
        tags: Mapping[str, str] | None = None,
        owner: str = "",
        description: str = "",
    ) -> None:
        self.name = self.prefix = check_name(name, "FeatureView")
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
        for feature, aggregation in self._each_window(features):
            place = f"feature {name}.{feature}"
            bound = aggregation.bound(where=where, hop_us=self.hop_us, at=place)
            check_input(bound.input, source.schema, at=place)
            self.base_features[feature] = bound
        self.derived_features: dict[str, DerivedFeature] = {}
        self.request: dict[str, RequestType] = {}
        for given, dtype in (request or {}).items():
            self._add_request(given, dtype)

    def _each_window(self, features: Mapping[str, Aggregation]) -> Iterator[tuple[str, Aggregation]]:
        """Features by name; one that is declared over several windows is as many."""
        named = set[str]()
        for declared, aggregation in features.items():
            place = f"feature {self.name}.{declared}"
            check_name(declared, place)
            if not isinstance(aggregation, Aggregation):
                raise InvalidDefinitionError(place, f"{aggregation!r} is no aggregation", 'write Count(window="30d")')
            for feature, each in aggregation.named(declared):
                if feature in named:
                    raise DuplicateNameError("feature", feature, f"feature view {self.name!r}")
                named.add(check_name(feature, place))
                yield feature, each

    def _add_request(self, name: str, dtype: RequestType) -> None:
        place = f"request input {self.name}.{name}"
        check_name(name, place)
        if dtype not in REQUEST_TYPES:
            raise InvalidDefinitionError(place, f"type {dtype!r} is unknown", f"use {', '.join(REQUEST_TYPES)}")
        if name in self:
            raise DuplicateNameError("feature and request input", name, f"feature view {self.name!r}")
        self.request[name] = dtype

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
        """Add a feature computed from features and request inputs of this view: a decorator.

        The function's name is the feature's; its parameters name features and request inputs of this
        view. It takes and gives float64 arrays of shape ``(n,)`` and runs unchanged offline and online; what
        it takes can't be written into.

        Raises:
            DuplicateNameError: If the view has a feature or request input of that name.
            UnknownFeatureError: If a parameter names none of them.
        """
        name = check_name(function.__name__, f"feature view {self.name!r}")
        if name in self or name in self.request:
            raise DuplicateNameError("feature", name, f"feature view {self.name!r}")
        inputs = tuple(inspect.signature(function).parameters)
        for each in inputs:
            if each not in self and each not in self.request:
                raise UnknownFeatureError(each, self.name, (*self.feature_names, *self.request))
        request = {each: self.request[each] for each in inputs if each in self.request}
        self.derived_features[name] = DerivedFeature(name, inputs, function, request)
        return function

    @property
    def ref(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @cached_property
    def pinned(self) -> FeatureView:
        """The same view with columns named ``name@version__feature``: to read it beside another version."""
        twin = copy.copy(self)
        twin.prefix = self.ref
        vars(twin)["pinned"] = twin
        return twin

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Aggregated features, then derived ones, in declared order."""
        return (*self.base_features, *self.derived_features)

    def needed(self, features: Iterable[str]) -> tuple[str, ...]:
        """Features that some of the view's features are computed from, and these themselves, in declared order."""
        needed = set(features)
        for name in reversed(self.derived_features):
            if name in needed:
                needed.update(self.derived_features[name].inputs)
        return tuple(name for name in self.feature_names if name in needed)

    def request_of(self, features: Iterable[str]) -> dict[str, RequestType]:
        """What a request has to bring for some of the view's features: type by name, in declared order."""
        derived = [self.derived_features[name] for name in self.needed(features) if name in self.derived_features]
        names = {name for each in derived for name in each.request}
        return {name: dtype for name, dtype in self.request.items() if name in names}

    @cached_property
    def categorical(self) -> tuple[str, ...]:
        """The features whose values are codes of texts (`heliostat.schema.text_codes`): categories, no quantities."""
        return tuple(
            name
            for name, each in self.base_features.items()
            if each.takes_texts
            and each.column is not None
            and pa.types.is_string(column_type(each.column, self.source.schema, at=f"feature {self.name}.{name}"))
        )

    @property
    def stored_features(self) -> tuple[str, ...]:
        """The features that need nothing of a request, in declared order: those that can be kept or looked up."""
        return tuple(name for name in self.feature_names if not self.request_of([name]))

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

    def derive(self, columns: dict[str, FloatArray], *, request: Mapping[str, FloatArray] | None = None) -> None:
        """Add the derived features to the aggregated ones, in place.

        Args:
            columns: Arrays of shape ``(n,)`` by feature name.
            request: What the request or the spine brings, shape ``(n,)`` by name. Features that need
                something else of a request are left out.
        """
        brought = request or {}
        known = {**brought, **columns}
        for name, feature in self.derived_features.items():
            if all(each in brought for each in self.request_of([name])):
                columns[name] = known[name] = feature(known)

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


def _read_only(column: FloatArray) -> FloatArray:
    view = column.view()
    view.flags.writeable = False
    return view


def request_types(features: Sequence[FeatureRef]) -> RequestTypes:
    """What features take from a request or a spine: type by name, in declared order.

    Raises:
        DuplicateNameError: If two views declare one name with two types.
    """
    by_view: dict[str, list[FeatureRef]] = {}
    for ref in features:
        by_view.setdefault(ref.view.prefix, []).append(ref)
    return merged_types(
        [(refs[0].view.ref, refs[0].view.request_of([ref.feature for ref in refs])) for refs in by_view.values()]
    )
