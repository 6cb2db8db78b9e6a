"""The first stage of a prediction: features of entities, and the model's routing document, in one round trip.

What it is asked and answers is plain data, about the entities of all requests that are answered together. So the
stage runs in the predictor's process or in another one, and the predictor can't tell.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from heliostat.clock import Clock
from heliostat.errors import SignatureMismatchError
from heliostat.features.definitions import FeatureView
from heliostat.features.request import UniformOverrides
from heliostat.models.definitions import Definitions
from heliostat.online.retrieval import FeatureReader, RowOverrides
from heliostat.online.tiles import RingLimits
from heliostat.serving.requests import Inputs, Overrides
from heliostat.storage.online_store import AsyncOnlineStore, OnlineKeys

FloatArray = NDArray[np.float64]

_PINNED = re.compile(r"@\d+__")
_MOST_NAMINGS = 256


def shown(name: str) -> str:
    """``view__feature`` of what was looked up as ``view@version__feature``."""
    return _PINNED.sub("__", name)


@dataclass(frozen=True, slots=True)
class FeatureQuery:
    """What to look up.

    Attributes:
        model: The model's name.
        names: Qualified features.
        entities: Entity keys as text, ``n`` of them.
        overrides: Values that the client gives, by row; NaN for null.
        inputs: What the client brings for derived features, by row; NaN for null.
    """

    model: str
    names: tuple[str, ...]
    entities: tuple[str, ...]
    overrides: Overrides = field(default_factory=dict)
    inputs: Inputs = field(default_factory=dict)

    def overrides_by_row(self) -> RowOverrides | None:
        """The overrides of every row; None if there are none at all."""
        if not self.overrides:
            return None
        if isinstance(self.overrides, UniformOverrides):
            return self.overrides
        return [self.overrides.get(row) for row in range(len(self.entities))]

    def input_columns(self, names: Iterable[str]) -> dict[str, FloatArray] | None:
        """Inputs as columns, shape ``(n,)``; None if there are none.

        NaN where the client wasn't asked: the model that is declared now doesn't need it, an older version does.
        """
        rows = [self.inputs.get(row, {}) for row in range(len(self.entities))]
        return {name: np.array([row.get(name, math.nan) for row in rows]) for name in names} or None


@dataclass(frozen=True, eq=False)
class FeatureBlock:
    """Features of many entities.

    Attributes:
        names: Qualified names of the columns.
        values: Shape ``(n, n_features)``, NaN where there is none.
        views: The views read.
        absent: Shape ``(n, n_views)``: whether a view holds nothing about an entity.
        route: The model's routing document, which came along; None if there is none.
        as_of_us: The instant of the features, microseconds since the epoch.
        stored: False if the store couldn't be read: then values are the client's, what was seen last, or NaN.
        newest_us: See `FeatureBatch.newest_us`; None if the store couldn't be read.
        cause: Where it couldn't: why (see `heliostat.serving.telemetry.CAUSES`).
        ages_s: Where it couldn't: how old what was seen last is, seconds; None where nothing was. By row.
    """

    names: tuple[str, ...]
    values: FloatArray
    views: tuple[str, ...]
    absent: NDArray[np.bool_]
    route: bytes | None
    as_of_us: int
    stored: bool = True
    newest_us: FloatArray | None = None
    ages_s: Sequence[float | None] = ()
    cause: str | None = None

    def taken(self, rows: NDArray[np.intp]) -> FeatureBlock:
        """Other rows: some of these, in any order, as often as wanted."""
        return replace(
            self,
            values=self.values[rows],
            absent=self.absent[rows],
            newest_us=None if self.newest_us is None else self.newest_us[rows],
            ages_s=[self.ages_s[row] for row in rows.tolist()] if self.ages_s else (),
        )

    def matrix(self, names: tuple[str, ...], rows: NDArray[np.intp] | None = None) -> FloatArray:
        """Some columns in another order, of some rows or (None) of all: C-contiguous.

        Raises:
            SignatureMismatchError: If a name isn't among the columns.
        """
        values = self.values if rows is None else self.values[rows]
        if names == self.names:
            return values
        places = {name: at for at, name in enumerate(self.names)}
        unknown = tuple(f"{name!r} is missing" for name in names if name not in places)
        if unknown:
            raise SignatureMismatchError("what was looked up", unknown, names)
        return np.ascontiguousarray(values[:, [places[name] for name in names]])

    def absent_views(self) -> list[tuple[str, ...]]:
        """For each row, the views that hold nothing."""
        if not self.absent.any():
            return [()] * len(self.absent)
        return [tuple(itertools.compress(self.views, row)) for row in self.absent.tolist()]


class FeatureReaders:
    """Readers of any features of the declared views, each planned once.

    Args:
        definitions: What is declared.
        keys: The online store's key names.
        n_buckets: The event log's number of buckets.
        limits: What the rings' layouts allow for.
    """

    def __init__(self, definitions: Definitions, *, keys: OnlineKeys, n_buckets: int, limits: RingLimits) -> None:
        self.definitions, self.keys = definitions, keys
        self._n_buckets, self._limits = n_buckets, limits
        self._planned: dict[tuple[str, ...], FeatureReader] = {}
        self._shown_as: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[str, ...]] = {}

    def of(self, names: tuple[str, ...]) -> FeatureReader:
        """A reader of features by qualified name; ``view@version__feature`` asks for one version of a view.

        Raises:
            UnknownViewError: If a view isn't declared.
            UnknownFeatureError: If a view has no such feature.
        """
        reader = self._planned.get(names)
        if reader is None:
            parts = [name.split("__", 1) for name in names]
            refs = [self._view(view)[feature] for view, feature in parts]
            reader = FeatureReader(refs, keys=self.keys, n_buckets=self._n_buckets, limits=self._limits)
            self._planned[names] = reader
        return reader

    def given_alone(self, query: FeatureQuery, *, as_of_us: int, route: bytes) -> FeatureBlock | None:
        """What is looked up, where the request gives all of it itself; None if something has to be read.

        Args:
            query: What was asked for.
            as_of_us: Now.
            route: The model's routing document, which would have come along.
        """
        found = self.of(query.names).given_alone(query.entities, query.overrides_by_row())
        if found is None:
            return None
        return FeatureBlock(
            found.names, found.matrix, found.views, found.absent, route, as_of_us, newest_us=found.newest_us
        )

    def _view(self, name: str) -> FeatureView:
        view = self.definitions.view(name)
        return view.pinned if name == view.ref else view

    def blank(
        self,
        query: FeatureQuery,
        *,
        as_of_us: int,
        seen: Mapping[int, FloatArray] | None = None,
        ages_s: Sequence[float | None] | None = None,
    ) -> FeatureBlock:
        """What can be said without the store: what the request gives, what derives from it, and nulls.

        An entity without events would count 0 purchases; of one that couldn't be looked up nothing is
        known, so that every aggregated feature is null.

        Args:
            query: What was asked for.
            as_of_us: Now.
            seen: What is known from elsewhere, by row, shape ``(len(query.names),)`` each; what the request gives
                goes over it.
            ages_s: How old that is, seconds; by row.
        """
        reader = self.of(query.names)
        unknown = {
            name: math.nan
            for view in {self._view(name.split("__", 1)[0]) for name in query.names}
            for name in (f"{view.name}__{feature}" for feature in view.base_features)
            if name in reader.overridable
        }
        n, known = len(query.entities), seen or {}
        rows: list[dict[str, float]] = []
        for row in range(n):
            given = self._qualified(reader, query.overrides.get(row, {}))
            rows.append(
                {**unknown, **self._seen(query, known[row], bool(given)), **given}
                if row in known
                else {**unknown, **given}
            )
        values = [None] * len(reader.keys(query.entities))
        inputs = query.input_columns(reader.request)
        batch = reader.decode(values, as_of_us=as_of_us, overrides=rows, inputs=inputs)
        nowhere = np.zeros(batch.absent.shape, dtype=np.bool_)
        return FeatureBlock(
            batch.names,
            batch.matrix,
            batch.views,
            nowhere,
            None,
            as_of_us,
            stored=False,
            ages_s=ages_s or [None] * n,
        )

    def _seen(self, query: FeatureQuery, values: FloatArray, changed: bool) -> dict[str, float]:
        """What was seen, as overrides; without what depends on the request, or derives from what it changes."""
        found: dict[str, float] = {}
        for name, value in zip(query.names, values.tolist(), strict=True):
            view, feature = self._view(name.split("__", 1)[0]), name.split("__", 1)[1]
            if feature in view.base_features or not (changed or view.request_of([feature])):
                found[shown(name)] = value
        return found

    def given(self, query: FeatureQuery) -> list[tuple[str, ...]] | None:
        """For each entity, the qualified features whose values the request gives; None: none for anybody.

        As signatures name them: without the version of a view that another one stands beside.
        """
        if not query.overrides:
            return None
        reader, n = self.of(query.names), len(query.entities)
        if isinstance(query.overrides, UniformOverrides):
            return [self._shown(reader, query.overrides.names)] * n
        rows = (query.overrides.get(row, {}) for row in range(n))
        return [self._shown(reader, tuple(each)) for each in rows]

    def _shown(self, reader: FeatureReader, names: tuple[str, ...]) -> tuple[str, ...]:
        """Overrides' names as signatures have them; rows, and requests, mostly give the same."""
        key = reader.names, names
        found = self._shown_as.get(key)
        if found is None:
            if len(self._shown_as) >= _MOST_NAMINGS:  # clients may name them in any order
                self._shown_as.clear()
            qualified = self._qualified(reader, dict.fromkeys(names, math.nan))
            found = self._shown_as[key] = tuple(sorted({shown(name) for name in qualified}))
        return found

    @staticmethod
    def _qualified(reader: FeatureReader, given: Mapping[str, float]) -> dict[str, float]:
        """Overrides by qualified name: a bare one mustn't stand beside the null of the same feature."""
        names = {place: name for name, place in reader.overridable.items() if "__" in name}
        return {names[reader.overridable[name]]: value for name, value in given.items()}


class FeatureLookup:
    """Reads the features of many entities, and the model's routing document, in one round trip.

    Args:
        store: The online store.
        readers: How to read features.
        clock: Tells now, the instant of the features.
    """

    def __init__(self, store: AsyncOnlineStore, readers: FeatureReaders, clock: Clock) -> None:
        self._store, self._readers, self._clock = store, readers, clock

    async def __call__(self, query: FeatureQuery) -> FeatureBlock:
        """Features as of now.

        Raises:
            StorageError: If the store doesn't answer, or what it holds can't be read.
        """
        now_us = self._clock.now_us()
        reader = self._readers.of(query.names)
        batch, (route,) = await reader.aread(
            self._store,
            query.entities,
            as_of_us=now_us,
            overrides=query.overrides_by_row(),
            inputs=query.input_columns(reader.request) if reader.request else None,
            also=[self._readers.keys.route(query.model)],
        )
        return FeatureBlock(
            batch.names, batch.matrix, batch.views, batch.absent, route, now_us, newest_us=batch.newest_us
        )
