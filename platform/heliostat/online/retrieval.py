"""Rings -> feature matrix: the online read, planned once and run for every request.

A `FeatureReader` knows which keys an entity's features need. Its work for a request is to
build them, one round trip, and a few array operations for all entities together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import InvalidDefinitionError, InvalidValueError, MissingInputError, UnknownFeatureError
from heliostat.features.aggregations import FloatArray
from heliostat.features.definitions import Entity, FeatureRef, request_types
from heliostat.features.request import UniformOverrides
from heliostat.online.compiled import bundle_names
from heliostat.online.tiles import BoolArray, RingLimits, ring_layout
from heliostat.online.view_plan import Given, Inputs, ViewPlan
from heliostat.schema import integer_buckets
from heliostat.settings import Settings
from heliostat.storage.online_store import AsyncOnlineStore, OnlineKeys, OnlineStore

# Of overrides, so many ways to name them are remembered.
_MOST_NAMINGS = 256

Overrides: TypeAlias = Mapping[str, float | int | bool | None]
"""Features that a request gives itself, by qualified or unambiguous bare name; None is null."""

RowOverrides: TypeAlias = Sequence[Overrides | None] | UniformOverrides
"""What each of ``n`` rows gives."""

EntityTexts: TypeAlias = Sequence[str] | Mapping[str, Sequence[str]]
"""Keys as `Entity.text` gives them, ``n`` of them; of several entities, by the entity's name, ``n`` of each."""


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """Feature vectors of ``n`` entities.

    Attributes:
        names: Qualified names, in the order asked for.
        matrix: Shape ``(n, n_features)``, float64; NaN is null.
        views: References of the views read.
        absent: Shape ``(n, n_views)``: the store has nothing of the entity, or only what the view's ttl
            has ended. Features of an absent view are those of no events at all.
        newest_us: Where the newest tile begins that the entity's rings hold, shape ``(n,)``, microseconds; NaN if
            they hold none. The newest event is at most that tile younger.
    """

    names: tuple[str, ...]
    matrix: FloatArray
    views: tuple[str, ...]
    absent: BoolArray
    newest_us: FloatArray

    @cached_property
    def null(self) -> BoolArray:
        """Shape ``(n, n_features)``: where there is no value."""
        return np.isnan(self.matrix)

    def missing(self, row: int) -> list[str]:
        """Names of the features without a value in one row."""
        return [self.names[column] for column in np.flatnonzero(self.null[row])]


class FeatureReader:
    """Reads the same features for any entities.

    Args:
        features: In the order of the matrix's columns, of any views; of several entities, each row then has
            a key of each.
        keys: The store's key names.
        n_buckets: The event log's number of buckets.
        limits: What the rings' layouts allow for.

    Raises:
        InvalidDefinitionError: If there are no features.
        DuplicateNameError: If two views take one request input as two types.
    """

    def __init__(
        self, features: Sequence[FeatureRef], *, keys: OnlineKeys, n_buckets: int, limits: RingLimits
    ) -> None:
        if not features:
            raise InvalidDefinitionError("a feature reader", "it has no features", "name at least one")
        self.entities = {each.view.entity.name: each.view.entity for each in features}
        self.names = tuple(feature.name for feature in features)
        self.request = request_types(features)
        self._n_buckets = n_buckets
        self._plans: list[ViewPlan] = []
        self._bundles: dict[tuple[str, str], int] = {}
        self._width = len(features)
        for view in {id(each.view): each.view for each in features}.values():
            asked = tuple((each.feature, column) for column, each in enumerate(features) if each.view is view)
            bundle = self._bundles.setdefault((view.source.name, view.entity.name), len(self._bundles))
            plan = ViewPlan.of(view, asked, ring_layout(view, limits), bundle=bundle, scratch=self._width)
            self._plans.append(plan)
            self._width += plan.n_scratch
        self.views = tuple(plan.view.ref for plan in self._plans)
        self._tags = tuple(f"{{b{bucket}}}:" for bucket in range(n_buckets))
        places = {id(plan.view): position for position, plan in enumerate(self._plans)}
        self._columns = [(places[id(each.view)], each.feature) for each in features]
        self._prefixes = tuple(keys.bundle_prefix(source, entity) for source, entity in self._bundles)
        integers = [name for name, entity in self.entities.items() if entity.has_integer_key]
        self._only_entity = integers[0] if len(self.entities) == len(integers) == 1 else None
        self._given_columns: dict[tuple[str, ...], NDArray[np.intp]] = {}

    @classmethod
    def open(cls, features: Sequence[FeatureRef], settings: Settings) -> Self:
        """A reader of the project that the settings name."""
        return cls(
            features,
            keys=OnlineKeys(settings.online.key_prefix, settings.project),
            n_buckets=settings.storage.buckets,
            limits=RingLimits.of(settings.ingestion),
        )

    @cached_property
    def overridable(self) -> dict[str, tuple[tuple[int, str], ...]]:
        """View and feature by every name that an override may use: the same ones in each version that is read."""
        bare: dict[str, set[str]] = {}
        names: dict[str, tuple[tuple[int, str], ...]] = {}
        for position, plan in enumerate(self._plans):
            for feature in (*plan.merge.features, *plan.derived):
                name = f"{plan.view.name}__{feature}"
                bare.setdefault(feature, set()).add(name)
                names[name] = (*names.get(name, ()), (position, feature))
        return names | {feature: names[found.pop()] for feature, found in bare.items() if len(found) == 1}

    def keys(self, entity_texts: EntityTexts) -> list[str]:
        """The keys to read: those of a source and entity together, row by row.

        Args:
            entity_texts: Whose.

        Raises:
            InvalidValueError: If an entity has no keys, or they aren't as many as the others'.
        """
        if self._only_entity is not None:
            texts = entity_texts.get(self._only_entity, ()) if isinstance(entity_texts, Mapping) else entity_texts
            found = bundle_names(self._prefixes, self._tags, texts)
            if found is not None:
                return found
        if isinstance(entity_texts, Mapping):
            by_entity = {name: entity_texts.get(name, ()) for name in self.entities}
        else:
            by_entity = dict.fromkeys(self.entities, entity_texts)
        if len(by_entity) > 1 and (
            not isinstance(entity_texts, Mapping) or len({len(texts) for texts in by_entity.values()}) > 1
        ):
            given = {name: len(texts) for name, texts in by_entity.items()}
            raise InvalidValueError(
                "keys", str(given), f"as many keys of each of {', '.join(self.entities)}, by name"
            )
        places = {name: self._places(self.entities[name], texts) for name, texts in by_entity.items()}
        pairs = zip(self._bundles, self._prefixes, strict=True)
        return [prefix + place for (_, entity), prefix in pairs for place in places[entity]]

    def _places(self, entity: Entity, texts: Sequence[str]) -> list[str]:
        """What each key's name ends with: bucket and key."""
        tags, n_buckets = self._tags, self._n_buckets
        if entity.has_integer_key:
            buckets = integer_buckets([int(text) for text in texts], n_buckets)
        else:
            buckets = entity.buckets(entity.encoded(texts), n_buckets).tolist()
        return [tags[bucket] + text for bucket, text in zip(buckets, texts, strict=True)]

    def decode(
        self,
        values: Sequence[bytes | None],
        *,
        as_of_us: int,
        overrides: RowOverrides | None = None,
        inputs: Inputs | None = None,
    ) -> FeatureBatch:
        """Merge rings into feature vectors.

        Overrides replace stored features before derived ones are computed; a derived feature that
        is given itself keeps what was given.

        Args:
            values: The values of `keys`.
            as_of_us: Now: later than every event in the rings.
            overrides: For each entity, or None; None: none for anybody.
            inputs: What the request brings for derived features.

        Raises:
            MissingInputError: If it lacks what a feature needs.
            RingCorruptError: If a value isn't a bundle, or what is in it no ring.
            UnknownFeatureError: If an override names none of the features that are read.
            InvalidValueError: If an override is no number.
        """
        n = len(values) // len(self._prefixes)
        brought = inputs or {}
        missing = tuple(name for name in self.request if name not in brought)
        if missing:
            raise MissingInputError(missing, f"the vector of {', '.join(self.views)}", "what was given")
        given = self._given(overrides) if overrides else {}
        wide = np.empty((n, self._width))
        absent = np.empty((n, len(self._plans)), dtype=np.bool_)
        newest_us = np.full(n, np.nan)
        for position, plan in enumerate(self._plans):
            plan.fill(
                wide,
                values,
                as_of_us,
                given=given.get(position, {}),
                inputs=brought,
                newest_us=newest_us,
                absent=absent,
                position=position,
            )
        n_names = len(self.names)
        matrix = wide if self._width == n_names else np.ascontiguousarray(wide[:, :n_names])
        return FeatureBatch(self.names, matrix, self.views, absent, newest_us)

    def _given(self, overrides: RowOverrides) -> dict[int, dict[str, Given]]:
        """Rows and values by view and feature."""
        found: dict[int, dict[str, Given]] = {}
        plain = _uniform(overrides)
        if plain is not None:
            for name, column in zip(plain.names, plain.matrix.T, strict=True):
                for position, feature in self._overridden(name):
                    found.setdefault(position, {})[feature] = (slice(None), column)
            return found
        single: dict[tuple[int, str], dict[int, float]] = {}
        for row in range(len(overrides)):
            for name, value in (overrides[row] or {}).items():
                for place in self._overridden(name):
                    single.setdefault(place, {})[row] = _number(name, value)
        for (position, feature), each in single.items():
            found.setdefault(position, {})[feature] = (np.array(list(each)), np.array(list(each.values())))
        return found

    def given_alone(self, entity_texts: EntityTexts, overrides: RowOverrides | None) -> FeatureBatch | None:
        """The vectors, where every row gives all that is asked for: then no ring needs to be read.

        None if there is something to read. Whether the store holds a view isn't known then, and not said.

        Raises:
            UnknownFeatureError: If an override names none of the features that are read.
        """
        if not overrides or isinstance(entity_texts, Mapping) or len(overrides) != len(entity_texts):
            return None
        plain = _uniform(overrides)
        if plain is None:
            return None
        columns = self._columns_given(plain.names)
        if columns is None:
            return None
        n = len(plain)
        absent = np.zeros((n, len(self._plans)), dtype=np.bool_)
        return FeatureBatch(self.names, plain.matrix.take(columns, axis=1), self.views, absent, np.full(n, np.nan))

    def _columns_given(self, names: tuple[str, ...]) -> NDArray[np.intp] | None:
        """Where among names of overrides each column of the matrix is; None if one isn't there."""
        known = self._given_columns.get(names)
        if known is not None or len(names) < len(self._columns):
            return known
        places: dict[tuple[int, str], int] = {}
        for at, name in enumerate(names):
            places.update(dict.fromkeys(self._overridden(name), at))
        found = [places[column] for column in self._columns if column in places]
        if len(found) < len(self._columns):
            return None
        if len(self._given_columns) >= _MOST_NAMINGS:  # clients may name them in any order
            self._given_columns.clear()
        columns = self._given_columns[names] = np.array(found, dtype=np.intp)
        return columns

    def _overridden(self, name: str) -> tuple[tuple[int, str], ...]:
        places = self.overridable.get(name)
        if places is None:
            raise UnknownFeatureError(name, ", ".join(self.views), tuple(self.overridable))
        return places

    def read(
        self,
        store: OnlineStore,
        entity_texts: EntityTexts,
        *,
        as_of_us: int,
        overrides: RowOverrides | None = None,
        inputs: Inputs | None = None,
        also: Sequence[str] = (),
    ) -> tuple[FeatureBatch, list[bytes | None]]:
        """Read feature vectors, and other keys with them, in one round trip.

        Where overrides give every row all that is asked for, rings aren't read, and no view is absent.

        Args:
            store: Where the rings are.
            entity_texts: Whose vectors.
            as_of_us: Now.
            overrides: For each entity, or None; see `decode`.
            inputs: What the request brings for derived features; see `decode`.
            also: Further keys, such as a routing document's.

        Returns:
            The vectors in the entities' order, and the values of ``also``.

        Raises:
            OnlineStoreUnavailableError: If the store doesn't answer.
        """
        if (batch := self.given_alone(entity_texts, overrides)) is not None:
            return batch, store.read(also) if also else []
        values = store.read([*also, *self.keys(entity_texts)])
        batch = self.decode(values[len(also) :], as_of_us=as_of_us, overrides=overrides, inputs=inputs)
        return batch, values[: len(also)]

    async def aread(
        self,
        store: AsyncOnlineStore,
        entity_texts: EntityTexts,
        *,
        as_of_us: int,
        overrides: RowOverrides | None = None,
        inputs: Inputs | None = None,
        also: Sequence[str] = (),
    ) -> tuple[FeatureBatch, list[bytes | None]]:
        """As `read`, for asyncio."""
        if (batch := self.given_alone(entity_texts, overrides)) is not None:
            return batch, await store.read(also) if also else []
        values = await store.read([*also, *self.keys(entity_texts)])
        batch = self.decode(values[len(also) :], as_of_us=as_of_us, overrides=overrides, inputs=inputs)
        return batch, values[: len(also)]


def _uniform(overrides: RowOverrides) -> UniformOverrides | None:
    return overrides if isinstance(overrides, UniformOverrides) else UniformOverrides.of(overrides)


def _number(name: str, value: float | bool | None) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or math.isinf(value):
        raise InvalidValueError(f"feature {name!r}", repr(value), "a finite number, true, false or null")
    return float(value)
