"""The three stages of a prediction: look features up, assign variants, run a model.

Each is an object that is called with one message and answers with one; the messages are plain
data. So a stage runs fused (the predictor awaits it directly) or distributed (the predictor
awaits a Serve handle that leads to a replica with the same object): the predictor can't tell.
A message is about many entities: of all the requests that were answered together.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import lightgbm  # noqa: F401 - imported before the first request: loading a version would wait for it
import numpy as np
from numpy.typing import NDArray

from heliostat.clock import Clock
from heliostat.errors import HeliostatError, InvalidRouteError, SignatureMismatchError, UnknownAliasError
from heliostat.experiments.assignment import OUTSIDE, RoutingDocument
from heliostat.features.definitions import FeatureView
from heliostat.models.definitions import Definitions
from heliostat.models.packaging import LoadedModel
from heliostat.models.registry import PRODUCTION
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.serving.requests import Inputs, Overrides
from heliostat.storage.online_store import AsyncOnlineStore, OnlineKeys

FloatArray = NDArray[np.float64]

_logger = logging.getLogger("heliostat.serving")

OUTSIDE_NAME = "outside"
"""The variant of entities outside of the experiment: the control's version serves them, and nobody counts them."""

_PINNED = re.compile(r"@\d+__")

# LightGBM scores about 200 rows a millisecond; more than this shouldn't hold up the event loop.
_ROWS_ON_THE_LOOP = 512


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

    def overrides_by_row(self) -> list[Mapping[str, float] | None] | None:
        """The overrides of every row; None if there are none at all."""
        if not self.overrides:
            return None
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
        stored: False if the store couldn't be read: then values are the client's, or NaN.
        newest_us: See `FeatureBatch.newest_us`; None if the store couldn't be read.
    """

    names: tuple[str, ...]
    values: FloatArray
    views: tuple[str, ...]
    absent: NDArray[np.bool_]
    route: bytes | None
    as_of_us: int
    stored: bool = True
    newest_us: FloatArray | None = None

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

    def _view(self, name: str) -> FeatureView:
        view = self.definitions.view(name)
        return view.pinned if name == view.ref else view

    def blank(self, query: FeatureQuery, *, as_of_us: int) -> FeatureBlock:
        """What can be said without the store: what the request gives, what derives from it, and nulls.

        An entity without events would count 0 purchases; of one that couldn't be looked up nothing is
        known, so that every aggregated feature is null.
        """
        reader = self.of(query.names)
        unknown = {
            name: math.nan
            for view in {self._view(name.split("__", 1)[0]) for name in query.names}
            for name in (f"{view.name}__{feature}" for feature in view.base_features)
            if name in reader.overridable
        }
        n = len(query.entities)
        rows = [{**unknown, **self._qualified(reader, query.overrides.get(row, {}))} for row in range(n)]
        values = [None] * len(reader.keys(query.entities))
        inputs = query.input_columns(reader.request)
        batch = reader.decode(values, as_of_us=as_of_us, overrides=rows, inputs=inputs)
        nowhere = np.zeros(batch.absent.shape, dtype=np.bool_)
        return FeatureBlock(batch.names, batch.matrix, batch.views, nowhere, None, as_of_us, stored=False)

    def given(self, query: FeatureQuery) -> list[tuple[str, ...]] | None:
        """For each entity, the qualified features whose values the request gives; None: none for anybody.

        As signatures name them: without the version of a view that another one stands beside.
        """
        if not query.overrides:
            return None
        reader = self.of(query.names)
        told: dict[tuple[str, ...], tuple[str, ...]] = {}  # rows mostly give the same
        found = []
        for row in range(len(query.entities)):
            given = query.overrides.get(row, {})
            names = tuple(given)
            if names not in told:
                told[names] = tuple(sorted({_PINNED.sub("__", name) for name in self._qualified(reader, given)}))
            found.append(told[names])
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


@dataclass(frozen=True, slots=True)
class RouteQuery:
    """Whom to assign.

    Attributes:
        model: The model's name.
        document: The routing document as it came with the features; None if it didn't.
        entities: Entity keys as text, ``n`` of them.
    """

    model: str
    document: bytes | None
    entities: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who is served by what.

    Attributes:
        revision: The routing document's.
        names: Variants, the control first; the last one stands for those outside of the experiment.
        versions: The version of each of them.
        chosen: Index into both, shape ``(n,)``.
        shadow: Versions to score and log besides.
    """

    revision: int
    names: tuple[str, ...]
    versions: tuple[int, ...]
    chosen: NDArray[np.int16]
    shadow: tuple[int, ...] = ()


class ABRouter:
    """Assigns entities to variants by the routing document that rides along with the features.

    A document is parsed only when its bytes change. When none comes along (the online store is
    down, or was emptied), the last one holds; before the first, the catalog's.

    Args:
        load: Gives the current document from the catalog, None if there is none; may block.
        reload_s: How often the catalog is asked, seconds.
    """

    def __init__(self, load: Callable[[str], RoutingDocument | None], *, reload_s: float = 1.0) -> None:
        self._load, self._reload_s = load, reload_s
        self._bytes: dict[str, bytes] = {}
        self._documents: dict[str, RoutingDocument] = {}
        self._asked: dict[str, tuple[float, asyncio.Task[RoutingDocument | None]]] = {}

    async def __call__(self, query: RouteQuery) -> Assignment:
        """The variant of each entity.

        Raises:
            UnknownAliasError: If no version of the model serves.
        """
        route = await self.route(query.model, query.document)
        chosen = route.assign(query.entities)
        return Assignment(
            revision=route.revision,
            names=(*(variant.name for variant in route.variants), OUTSIDE_NAME),
            versions=(*(variant.version for variant in route.variants), route.control.version),
            chosen=np.where(chosen == OUTSIDE, len(route.variants), chosen).astype(np.int16),
            shadow=route.shadow,
        )

    async def route(self, model: str, document: bytes | None) -> RoutingDocument:
        """The routing document that holds now.

        Raises:
            UnknownAliasError: If no version of the model serves.
        """
        if document is not None and document != self._bytes.get(model):
            try:
                self._documents[model] = RoutingDocument.from_bytes(document)
            except InvalidRouteError as error:
                _logger.warning("the routing document of model %s is passed over: %s", model, error)
            self._bytes[model] = document
        known = self._documents.get(model)
        if known is None:
            known = await asyncio.shield(self._ask_catalog(model))
        elif document is None:
            self._ask_catalog(model)  # whoever comes next has its answer; nobody waits for it
        if known is None:
            raise UnknownAliasError(model, PRODUCTION, ())
        return known

    def _ask_catalog(self, model: str) -> asyncio.Task[RoutingDocument | None]:
        """Ask the catalog for a model's document, unless that was done a moment ago."""
        loop = asyncio.get_running_loop()
        asked, task = self._asked.get(model) or (-math.inf, None)
        if task is None or (task.done() and loop.time() >= asked + self._reload_s):
            task = loop.create_task(self._from_catalog(model))
            self._asked[model] = loop.time(), task
        return task

    async def _from_catalog(self, model: str) -> RoutingDocument | None:
        try:
            found = await asyncio.to_thread(self._load, model)
        except HeliostatError as error:
            _logger.warning("the routing document of model %s can't be loaded: %s", model, error)
            return None
        if found is not None:
            self._documents[model] = found
            self._bytes.pop(model, None)
        return found


@dataclass(frozen=True, slots=True)
class ScoreQuery:
    """What to score.

    Attributes:
        model: The model's name.
        version: Which version of it.
        matrix: Shape ``(n, n_features)``, columns in the order of the version's signature.
        explain: Whether contributions are wanted instead of scores.
    """

    model: str
    version: int
    matrix: FloatArray
    explain: bool = False


class ModelRunner:
    """Scores rows with any version of any model; keeps the versions that were used last.

    Args:
        load: Gives a version, ready to predict; may block, and may raise.
        capacity: How many versions are kept.
    """

    def __init__(self, load: Callable[[str, int], LoadedModel], *, capacity: int = 8) -> None:
        self._load, self._capacity = load, capacity
        self._loaded: OrderedDict[tuple[str, int], LoadedModel] = OrderedDict()
        self._loading: dict[tuple[str, int], asyncio.Task[LoadedModel]] = {}

    async def __call__(self, query: ScoreQuery) -> FloatArray:
        """Scores, shape ``(n,)``; or what they are made of, as `LoadedModel.contributions` gives it.

        Raises:
            HeliostatError: If the version can't be loaded, or the matrix doesn't fit its signature.
        """
        model = self._loaded.get((query.model, query.version))
        if model is None:
            model = await self.loaded(query.model, query.version)
        else:
            self._loaded.move_to_end((query.model, query.version))
        if query.explain:
            return await asyncio.to_thread(model.contributions, query.matrix)
        if len(query.matrix) > _ROWS_ON_THE_LOOP:
            return await asyncio.to_thread(model.predict, query.matrix)
        return model.predict(query.matrix)

    async def loaded(self, model: str, version: int) -> LoadedModel:
        """A version, loaded once however many ask for it; loading goes on if they leave.

        Raises:
            HeliostatError: If it can't be loaded; the next who asks makes it try again.
        """
        key = (model, version)
        if key in self._loaded:
            return self._loaded[key]
        task = self._loading.get(key)
        if task is None:
            task = asyncio.create_task(self._load_once(key))
            self._loading[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(task)

    async def _load_once(self, key: tuple[str, int]) -> LoadedModel:
        model = await asyncio.to_thread(self._load, *key)
        self._loaded[key] = model
        while len(self._loaded) > self._capacity:
            self._loaded.popitem(last=False)
        return model

    def _forget(self, key: tuple[str, int], done: asyncio.Task[LoadedModel]) -> None:
        self._loading.pop(key, None)
        if not done.cancelled():
            done.exception()  # read, or asyncio complains when everybody who waited has left
