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
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import lightgbm  # noqa: F401 - imported before the first request: loading a version would wait for it
import numpy as np
from numpy.typing import NDArray

from heliostat.clock import Clock
from heliostat.errors import (
    HeliostatError,
    InvalidRouteError,
    ModelTooLargeError,
    SignatureMismatchError,
    UnknownAliasError,
    UnknownVariantError,
)
from heliostat.experiments.assignment import OUTSIDE, RoutingDocument
from heliostat.features.definitions import FeatureView
from heliostat.features.request import UniformOverrides
from heliostat.models.definitions import Definitions
from heliostat.models.packaging import LoadedModel
from heliostat.models.registry import PRODUCTION
from heliostat.online.retrieval import FeatureReader, RowOverrides
from heliostat.online.tiles import RingLimits
from heliostat.serving.breaker import Breaker, guarded
from heliostat.serving.lanes import Lane, in_thread
from heliostat.serving.requests import Inputs, Overrides
from heliostat.serving.telemetry import Board
from heliostat.storage.online_store import AsyncOnlineStore, OnlineKeys

FloatArray = NDArray[np.float64]

_logger = logging.getLogger("heliostat.serving")

OUTSIDE_NAME = "outside"
"""The variant of entities outside of the experiment: the control's version serves them, and nobody counts them."""

_PINNED = re.compile(r"@\d+__")

# A call on the event loop holds up everybody: it should take no longer than this, and is at most so many rows.
_SHORT_S = 0.005
_ROWS_ON_THE_LOOP = 4096
# A version that took longer than this so often, against all expectation, gets no more calls there.
_TOO_LONG_S = 0.1
_SLOW_CALLS = 3
# So many calls with real features are made in a thread first: what hangs on them shows there, and holds up nobody.
_PROVING_CALLS = 32
_TRIAL_ROWS = 64
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

    def forced(self, model: str, variant: str, *, prefix: str) -> Assignment:
        """One variant for everybody, whoever they are assigned to; its name gets a prefix.

        Raises:
            UnknownVariantError: If there is no such variant.
        """
        names = self.names[:-1]
        if variant not in names:
            raise UnknownVariantError(variant, model, names)
        chosen = np.full(len(self.chosen), names.index(variant), dtype=np.int16)
        return Assignment(self.revision, tuple(prefix + name for name in self.names), self.versions, chosen)


class ABRouter:
    """Assigns entities to variants by the routing document that rides along with the features.

    A document is parsed only when its bytes change. When none comes along (the online store is
    down, or was emptied), the last one holds; before the first, the catalog's.

    Args:
        load: Gives the current document from the catalog, None if there is none; may block.
        reload_s: How often the catalog is asked, seconds.
        breaker: The catalog's.
    """

    def __init__(
        self,
        load: Callable[[str], RoutingDocument | None],
        *,
        reload_s: float = 1.0,
        breaker: Breaker | None = None,
    ) -> None:
        self._reload_s = reload_s

        async def ask(model: str) -> RoutingDocument | None:
            return await in_thread(load, model)

        self._load = ask if breaker is None else guarded(ask, breaker)
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
            found = await self._load(model)
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
        beside: Whether nobody waits for it, so that it must hold up nobody: a shadow's.
    """

    model: str
    version: int
    matrix: FloatArray
    explain: bool = False
    beside: bool = False


@dataclass(slots=True, eq=False)
class _Held:
    """A loaded version.

    Attributes:
        lane: Its threads.
        rows_on_loop: More rows than this go to a thread.
        slow: How often the event loop was held up by it.
        proving: So many more calls with real features are to go well in a thread before one is made on the loop.
    """

    model: LoadedModel
    lane: Lane
    rows_on_loop: int
    slow: int = 0
    proving: int = _PROVING_CALLS


class ModelRunner:
    """Scores rows with any version of any model; keeps the versions that were used last.

    A version is tried in a thread when it is loaded: one that raises or hangs never gets further. What a row
    costs is measured then, and calls that are short enough are made on the event loop, since a thread would
    cost more than they do; all others in the version's own threads, so that nobody else waits for them. So are
    its first calls with real features, however short: those of the trial are nulls, and it may hang on others.

    Args:
        load: Gives a version, ready to predict; may block, and may raise.
        capacity_bytes: What all versions together may take, about.
        threads: Calls of a version in threads at once.
        isolated: Whether every call is made in a thread.
    """

    def __init__(
        self,
        load: Callable[[str, int], LoadedModel],
        *,
        capacity_bytes: int = 1 << 30,
        threads: int = 2,
        isolated: bool = False,
    ) -> None:
        self._load, self._capacity_bytes, self._threads, self._isolated = load, capacity_bytes, threads, isolated
        self._held: OrderedDict[tuple[str, int], _Held] = OrderedDict()
        self._loading: dict[tuple[str, int], asyncio.Task[_Held]] = {}
        self._hits = self._misses = 0

    def report(self, board: Board) -> None:
        """Put into numbers what is held, and how often it was what was asked for."""
        board.set("heliostat_models_loaded", value=len(self._held))
        board.set("heliostat_model_memory_bytes", value=self.bytes_held)
        board.set("heliostat_cache_total", "models", "hit", value=self._hits)
        board.set("heliostat_cache_total", "models", "miss", value=self._misses)

    @property
    def bytes_held(self) -> int:
        """What the loaded versions take, about."""
        return sum(held.model.package.memory_bytes for held in self._held.values())

    async def __call__(self, query: ScoreQuery) -> FloatArray:
        """Scores, shape ``(n,)``; or what they are made of, as `LoadedModel.contributions` gives it.

        Raises:
            HeliostatError: If the version can't be loaded, or the matrix doesn't fit its signature.
        """
        key = query.model, query.version
        held = self._held.get(key)
        if held is None:
            self._misses += 1
            held = await self._loaded(key)
        else:
            self._hits += 1
            self._held.move_to_end(key)
        if query.explain:
            return await held.lane.call(held.model.contributions, query.matrix)
        if query.beside or len(query.matrix) > held.rows_on_loop:
            return await held.lane.call(held.model.predict, query.matrix)
        if held.proving:
            scores = await held.lane.call(held.model.predict, query.matrix)
            if not np.isnan(query.matrix).all():
                held.proving = max(0, held.proving - 1)
            return scores
        begin = time.perf_counter()
        scores = held.model.predict(query.matrix)
        if time.perf_counter() - begin > _TOO_LONG_S:
            self._note_slow(key, held)
        return scores

    async def loaded(self, model: str, version: int) -> LoadedModel:
        """A version, loaded once however many ask for it; loading goes on if they leave.

        Raises:
            HeliostatError: If it can't be loaded; the next who asks makes it try again.
        """
        return (await self._loaded((model, version))).model

    async def _loaded(self, key: tuple[str, int]) -> _Held:
        held = self._held.get(key)
        if held is not None:
            return held
        task = self._loading.get(key)
        if task is None:
            task = asyncio.create_task(self._load_once(key))
            self._loading[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(task)

    async def _load_once(self, key: tuple[str, int]) -> _Held:
        model, row_s = await in_thread(self._tried, *key)
        size = model.package.memory_bytes
        if size > self._capacity_bytes:
            raise ModelTooLargeError(*key, size, self._capacity_bytes)
        rows = 0 if self._isolated else min(_ROWS_ON_THE_LOOP, int(_SHORT_S / row_s))
        held = self._held[key] = _Held(
            model, Lane("version {1} of model {0}".format(*key), at_once=self._threads), rows
        )
        while self.bytes_held > self._capacity_bytes:
            self._held.popitem(last=False)
        return held

    def _tried(self, model: str, version: int) -> tuple[LoadedModel, float]:
        """A version that has shown that it predicts, and what a row costs it, seconds."""
        loaded = self._load(model, version)
        matrix = np.full((_TRIAL_ROWS, len(loaded.signature.names)), np.nan)
        spent: list[float] = []
        for _ in range(3):  # the first call makes what later ones use
            begin = time.perf_counter()
            loaded.predict(matrix)
            spent.append(time.perf_counter() - begin)
        return loaded, max(min(spent) / _TRIAL_ROWS, 1e-9)

    def _note_slow(self, key: tuple[str, int], held: _Held) -> None:
        held.slow += 1
        if held.slow >= _SLOW_CALLS:
            held.rows_on_loop = 0
            _logger.warning("version %d of model %s is scored in threads from now on: it takes long", key[1], key[0])

    def _forget(self, key: tuple[str, int], done: asyncio.Task[_Held]) -> None:
        self._loading.pop(key, None)
        if not done.cancelled():
            done.exception()  # read, or asyncio complains when everybody who waited has left
