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

from heliostat.errors import InvalidDefinitionError, InvalidValueError, RingCorruptError, UnknownFeatureError
from heliostat.features.aggregations import FloatArray
from heliostat.features.definitions import Entity, FeatureRef, FeatureView
from heliostat.features.merging import MergePlan, merge_rings, parse_rings
from heliostat.features.tiles import BoolArray, RingGroup, RingLimits, ring_layout
from heliostat.settings import Settings
from heliostat.storage.online_store import AsyncOnlineStore, OnlineKeys, OnlineStore

Overrides: TypeAlias = Mapping[str, float | int | bool | None]
"""Features that a request gives itself, by qualified or unambiguous bare name; None is null."""


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """Feature vectors of ``n`` entities.

    Attributes:
        names: Qualified names, in the order asked for.
        matrix: Shape ``(n, n_features)``, float64; NaN is null.
        views: References of the views read.
        absent: Shape ``(n, n_views)``: the store has nothing of the entity, or only what the view's ttl
            has ended. Features of an absent view are those of no events at all.
    """

    names: tuple[str, ...]
    matrix: FloatArray
    views: tuple[str, ...]
    absent: BoolArray

    @cached_property
    def null(self) -> BoolArray:
        """Shape ``(n, n_features)``: where there is no value."""
        return np.isnan(self.matrix)

    def missing(self, row: int) -> list[str]:
        """Names of the features without a value in one row."""
        return [self.names[column] for column in np.flatnonzero(self.null[row])]


@dataclass(frozen=True, eq=False)
class _ViewPlan:
    """What is read and computed of one view.

    Attributes:
        view: The view.
        merge: Its rings, and the aggregated features that are needed, themselves or by derived ones.
        derived: Derived features that are needed, in declared order.
        first: Where the view's rings begin among those of an entity.
    """

    view: FeatureView
    merge: MergePlan
    derived: tuple[str, ...]
    first: int


class FeatureReader:
    """Reads the same features for any entities.

    Args:
        features: In the order of the matrix's columns; of one entity, and of any of its views.
        keys: The store's key names.
        n_buckets: The event log's number of buckets.
        limits: What the rings' layouts allow for.

    Raises:
        InvalidDefinitionError: If there are no features, or they belong to several entities.
    """

    def __init__(
        self, features: Sequence[FeatureRef], *, keys: OnlineKeys, n_buckets: int, limits: RingLimits
    ) -> None:
        self.entity = _entity_of(features)
        self.names = tuple(feature.name for feature in features)
        self._n_buckets = n_buckets
        self._plans: list[_ViewPlan] = []
        self._prefixes: list[str] = []
        for view in {id(each.view): each.view for each in features}.values():
            plan = self._planned(view, {each.feature for each in features if each.view is view}, limits)
            self._prefixes.extend(keys.ring_prefix(view.ref, group.name) for group in plan.merge.groups)
            self._plans.append(plan)
        self.views = tuple(plan.view.ref for plan in self._plans)
        places = {id(plan.view): position for position, plan in enumerate(self._plans)}
        self._columns = [(places[id(each.view)], each.feature) for each in features]
        self._tags = [f"{{b{bucket}}}:" for bucket in range(n_buckets)]

    @classmethod
    def open(cls, features: Sequence[FeatureRef], settings: Settings) -> Self:
        """A reader of the project that the settings name."""
        return cls(
            features,
            keys=OnlineKeys(settings.online.key_prefix, settings.project),
            n_buckets=settings.storage.buckets,
            limits=RingLimits.of(settings.ingestion),
        )

    def _planned(self, view: FeatureView, asked: set[str], limits: RingLimits) -> _ViewPlan:
        needed = set(asked)
        for name in reversed(view.derived_features):
            if name in needed:
                needed.update(view.derived_features[name].inputs)
        merge = MergePlan(ring_layout(view, limits), [name for name in view.base_features if name in needed])
        derived = tuple(name for name in view.derived_features if name in needed)
        return _ViewPlan(view, merge, derived, first=len(self._prefixes))

    @cached_property
    def overridable(self) -> dict[str, tuple[int, str]]:
        """View and feature by every name that an override may use."""
        bare: dict[str, list[tuple[int, str]]] = {}
        names: dict[str, tuple[int, str]] = {}
        for position, plan in enumerate(self._plans):
            for feature in (*plan.merge.features, *plan.derived):
                bare.setdefault(feature, []).append((position, feature))
                names[f"{plan.view.name}__{feature}"] = (position, feature)
        return names | {name: places[0] for name, places in bare.items() if len(places) == 1}

    def keys(self, entity_texts: Sequence[str]) -> list[str]:
        """The keys to read: ring by ring, and within a ring entity by entity.

        Args:
            entity_texts: Keys as `Entity.text` gives them.
        """
        encoded = self.entity.encoded(entity_texts)
        tags = self._tags
        buckets = self.entity.buckets(encoded, self._n_buckets).tolist()
        places = [tags[bucket] + text for bucket, text in zip(buckets, entity_texts, strict=True)]
        return [prefix + place for prefix in self._prefixes for place in places]

    def decode(
        self,
        values: Sequence[bytes | None],
        *,
        as_of_us: int,
        overrides: Sequence[Overrides | None] | None = None,
    ) -> FeatureBatch:
        """Merge rings into feature vectors.

        Overrides replace stored features before derived ones are computed; a derived feature that
        is given itself keeps what was given.

        Args:
            values: The values of `keys`.
            as_of_us: Now: later than every event in the rings.
            overrides: For each entity, or None.

        Raises:
            RingCorruptError: If a value isn't a ring.
            UnknownFeatureError: If an override names none of the features that are read.
            InvalidValueError: If an override is no number.
        """
        n = len(values) // len(self._prefixes)
        given = self._given(overrides)
        absent = np.empty((n, len(self._plans)), dtype=np.bool_)
        columns = [
            self._view_columns(plan, values, n, as_of_us, given.get(position, {}), absent[:, position])
            for position, plan in enumerate(self._plans)
        ]
        matrix = np.empty((n, len(self._columns)))
        for column, (position, feature) in enumerate(self._columns):
            matrix[:, column] = columns[position][feature]
        return FeatureBatch(self.names, matrix, self.views, absent)

    def _view_columns(
        self,
        plan: _ViewPlan,
        values: Sequence[bytes | None],
        n: int,
        as_of_us: int,
        given: Mapping[str, list[tuple[int, float]]],
        absent: BoolArray,
    ) -> dict[str, FloatArray]:
        rings = {}
        absent[:] = True
        for at, group in enumerate(plan.merge.groups, plan.first):
            own = values[at * n : (at + 1) * n]
            rings[group.label] = self._parsed(plan, group, own)
            absent &= np.fromiter((value is None for value in own), np.bool_, n)
        merged = merge_rings(plan.merge, rings, as_of_us=as_of_us)
        if merged.expired is not None:
            absent |= merged.expired
        columns = {name: _replaced(column, given.get(name)) for name, column in merged.columns.items()}
        for name in plan.derived:
            columns[name] = _replaced(plan.view.derived_features[name](columns), given.get(name))
        return columns

    def _parsed(self, plan: _ViewPlan, group: RingGroup, values: Sequence[bytes | None]) -> FloatArray:
        try:
            return parse_rings(group, values)
        except ValueError:
            lengths = tuple(sorted({len(value) for value in values if value is not None}))
            raise RingCorruptError(plan.view.ref, group.name, lengths, len(group.empty_ring)) from None

    def _given(self, overrides: Sequence[Overrides | None] | None) -> dict[int, dict[str, list[tuple[int, float]]]]:
        """Rows and values by view and feature."""
        found: dict[int, dict[str, list[tuple[int, float]]]] = {}
        for row, features in enumerate(overrides or ()):
            for name, value in (features or {}).items():
                position, feature = self._place(name)
                found.setdefault(position, {}).setdefault(feature, []).append((row, _number(name, value)))
        return found

    def _place(self, name: str) -> tuple[int, str]:
        place = self.overridable.get(name)
        if place is None:
            raise UnknownFeatureError(name, ", ".join(self.views), tuple(self.overridable))
        return place

    def read(
        self,
        store: OnlineStore,
        entity_texts: Sequence[str],
        *,
        as_of_us: int,
        overrides: Sequence[Overrides | None] | None = None,
        also: Sequence[str] = (),
    ) -> tuple[FeatureBatch, list[bytes | None]]:
        """Read feature vectors, and other keys with them, in one round trip.

        Args:
            store: Where the rings are.
            entity_texts: Keys as `Entity.text` gives them.
            as_of_us: Now.
            overrides: For each entity, or None; see `decode`.
            also: Further keys, such as a routing document's.

        Returns:
            The vectors in the entities' order, and the values of ``also``.

        Raises:
            OnlineStoreUnavailableError: If the store doesn't answer.
        """
        values = store.read([*also, *self.keys(entity_texts)])
        return self.decode(values[len(also) :], as_of_us=as_of_us, overrides=overrides), values[: len(also)]

    async def aread(
        self,
        store: AsyncOnlineStore,
        entity_texts: Sequence[str],
        *,
        as_of_us: int,
        overrides: Sequence[Overrides | None] | None = None,
        also: Sequence[str] = (),
    ) -> tuple[FeatureBatch, list[bytes | None]]:
        """As `read`, for asyncio."""
        values = await store.read([*also, *self.keys(entity_texts)])
        return self.decode(values[len(also) :], as_of_us=as_of_us, overrides=overrides), values[: len(also)]


def _entity_of(features: Sequence[FeatureRef]) -> Entity:
    entities = {feature.view.entity.name: feature.view.entity for feature in features}
    if len(entities) != 1:
        raise InvalidDefinitionError(
            "a feature reader", f"its features belong to the entities {sorted(entities)}", "read one entity at a time"
        )
    return next(iter(entities.values()))


def _replaced(column: FloatArray, given: Sequence[tuple[int, float]] | None) -> FloatArray:
    if not given:
        return column
    column = column.copy()  # may be a state that other features share
    for row, value in given:
        column[row] = value
    return column


def _number(name: str, value: float | bool | None) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or math.isinf(value):
        raise InvalidValueError(f"feature {name!r}", repr(value), "a finite number, true, false or null")
    return float(value)
