"""The stages as Ray Serve deployments, and how each is put together from a workspace.

The objects inside are those of `heliostat.serving`; a replica opens its own workspace, on its
own event loop.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, TypeVar

from numpy import float64
from numpy.typing import NDArray
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from deployments.gateway import Parts
from deployments.meter import Exporter
from heliostat.errors import HeliostatError, ModelTooLargeError, StaleVersionError, StorageError
from heliostat.ingestion.intake import Intake
from heliostat.models.packaging import LoadedModel, ModelPackage
from heliostat.models.profile import Profile, mean_prediction
from heliostat.models.rows import version_features
from heliostat.online.tiles import RingLimits
from heliostat.serving.access import KeyRing
from heliostat.serving.backlog import Backlog
from heliostat.serving.breaker import BreakerRule, Breakers, guarded
from heliostat.serving.fallback import BatchCache, Rung, VersionLadder
from heliostat.serving.keys import KeyBook
from heliostat.serving.lookup import FeatureBlock, FeatureLookup, FeatureQuery, FeatureReaders
from heliostat.serving.prediction_log import PredictionLog
from heliostat.serving.predictor import STORE, Predictor, Stages
from heliostat.serving.routing import ABRouter, Assignment, RouteQuery
from heliostat.serving.scoring import ModelRunner, ScoreQuery
from heliostat.serving.spare_features import SpareFeatures, SpareRule
from heliostat.serving.standby import CatalogLook, Standby
from heliostat.serving.telemetry import Board, Meter
from heliostat.serving.version_book import VersionBook, VersionFacts
from heliostat.settings import Settings
from heliostat.storage.online_store import AsyncOnlineStore
from heliostat.storage.stream_entries import StreamName
from heliostat.storage.streams import AsyncStreams, record_key
from heliostat.workspace import Workspace

_NO_LIMIT = 1_000_000
# How long a batch is left alone. A hop costs as much for a hundred requests as for one: where there are hops, fewer
# and larger batches are 1.6 times as many requests a second, 64 at once, as with the patience of one process.
_PATIENCE_S, _PATIENCE_WITH_HOPS_S = 0.01, 0.05
# Of breakers, as metrics name them; see also `STORE`.
CATALOG = "catalog"
ROUTER = "router"
LOG = "prediction log"

QueryT = TypeVar("QueryT")
AnswerT = TypeVar("AnswerT")


# ── From a workspace ────────────────────────────────────────────────────────────────


def feature_readers(workspace: Workspace) -> FeatureReaders:
    """Plans of what is read of the online store."""
    settings = workspace.settings
    limits = RingLimits.of(settings.ingestion)
    keys = workspace.online_config.keys
    return FeatureReaders(workspace.definitions, keys=keys, n_buckets=settings.storage.buckets, limits=limits)


def feature_lookup(workspace: Workspace, store: AsyncOnlineStore) -> FeatureLookup:
    """The stage that reads features."""
    return FeatureLookup(store, feature_readers(workspace), workspace.clock)


def ab_router(workspace: Workspace, breakers: Breakers) -> ABRouter:
    """The stage that assigns variants."""
    return ABRouter(workspace.rollout.current, breaker=breakers.of(CATALOG))


def breakers_of(settings: Settings, meter: Meter | None = None) -> Breakers:
    """Circuit breakers as the settings want them."""
    wanted = settings.serving.breaker
    rule = BreakerRule(wanted.failures, wanted.open_s, wanted.max_open_s)
    made = Breakers(rule)
    if meter is not None:
        meter.watch_breakers(made.states)
    return made


def model_runner(workspace: Workspace) -> ModelRunner:
    """The stage that scores."""
    serving = workspace.settings.serving

    def load(model: str, version: int) -> LoadedModel:
        package = workspace.models.package(model, version)
        if package.memory_bytes > serving.model_memory_bytes:
            raise ModelTooLargeError(model, version, package.memory_bytes, serving.model_memory_bytes)
        return package.load()

    return ModelRunner(
        load,
        capacity_bytes=serving.model_memory_bytes,
        threads=serving.model_threads,
        isolated=serving.model_isolation == "always",
    )


def standby(workspace: Workspace, prepare: Callable[[str, int], Awaitable[object]], breakers: Breakers) -> Standby:
    """What loads versions before they serve."""
    return Standby(
        workspace.definitions.models,
        CatalogLook(workspace.models, workspace.rollout),
        prepare,
        breaker=breakers.of(CATALOG),
        every_s=workspace.settings.serving.standby_s,
    )


def version_facts(workspace: Workspace) -> Callable[[str, int], VersionFacts]:
    """Reads what must be known of a version to ask it, or to do without it."""

    def read(model: str, version: int) -> VersionFacts:
        found = workspace.models.get(model, version)
        stale: tuple[str, ...] = ()
        try:
            version_features(found, workspace.definitions.views)
        except StaleVersionError as error:
            stale = error.views
        package = workspace.models.package(model, version)
        return VersionFacts(
            found.signature.names,
            mean_prediction(package.profile),
            stale,
            workspace.definitions.lookup_names(found.pinned_names),
            package.raw_scale,
            _medians(package),
        )

    return read


def _medians(package: ModelPackage) -> tuple[float, ...]:
    """Training medians of a version's features; NaN for categories, whose codes have none, and without values."""
    if package.profile is None:
        return ()
    signature, columns = package.signature, Profile.from_document(package.profile).features
    return tuple(
        columns[name].bins.center
        if name in columns and columns[name].finite and name not in signature.categorical
        else math.nan
        for name in signature.names
    )


def key_ring(workspace: Workspace) -> KeyRing | None:
    """What knows the API keys, where the settings want keys."""
    serving = workspace.settings.serving
    if serving.access != "keys":
        return None
    book = KeyBook.of(workspace)
    return KeyRing(book.known, book.clock, within_s=serving.keys_within_s, hold_s=serving.keys_hold_s)


def stream_names(workspace: Workspace) -> dict[str, list[str]]:
    """The keys of all streams, as metrics name them: a source's are one."""
    config, n_buckets = workspace.online_config, workspace.settings.storage.buckets
    events = {
        f"events {source}": config.keys.event_streams(source, n_buckets) for source in workspace.definitions.sources
    }
    records: tuple[StreamName, ...] = ("predictions", "actuals")
    return events | {name: [record_key(config, name)] for name in records}


def waiting_limit(settings: Settings) -> int:
    """How many prediction requests may wait for their turn in a replica."""
    queued = settings.serving.max_queued_requests
    return _NO_LIMIT if queued < 0 else max(1, queued)


def prediction_log(settings: Settings, streams: AsyncStreams, breakers: Breakers) -> PredictionLog:
    """The prediction log as the settings want it."""
    serving = settings.serving
    return PredictionLog(
        guarded(streams.append_predictions, breakers.of(LOG)),
        guarded(streams.append_prediction_while, breakers.of(LOG)) if streams.can_check else None,
        when_fails=serving.when_log_fails,
        buffer_rows=serving.log_buffer_rows if serving.log == "async" else 0,
        late_rows=serving.log_buffer_rows,
        max_delay_s=serving.log_max_delay_s,
        grace_s=serving.drain_s / 2,
    )


def gateway_parts(
    workspace: Workspace,
    meter: Meter,
    *,
    features: DeploymentHandle | None = None,
    router: DeploymentHandle | None = None,
    runner: DeploymentHandle | None = None,
) -> Parts:
    """What the gateway's routes work with; to be made on the event loop that uses it.

    Args:
        workspace: Stays open as long as the parts are used; they close it.
        meter: Counts.
        features: Leads to FeatureLookup; None: in this process.
        router: Leads to ABRouter; None: in this process.
        runner: Leads to ModelReplica; None: in this process.
    """
    settings = workspace.settings
    store, streams = AsyncOnlineStore(workspace.online_config), AsyncStreams(workspace.online_config)
    serving, breakers = settings.serving, breakers_of(settings, meter)
    spare, readers = ab_router(workspace, breakers), feature_readers(workspace)
    versions = VersionBook(version_facts(workspace))
    looking = feature_lookup(workspace, store) if features is None else Remote[FeatureQuery, FeatureBlock](features)
    batches = BatchCache(guarded(store.read, breakers.of(STORE)), workspace.online_config.keys, workspace.clock)
    rungs = tuple(map(Rung, serving.fallback))
    ladder = VersionLadder(
        versions.prior,
        breakers,
        rungs=rungs,
        last_good=lambda model: waiting.last_good(model),
        cached=batches,
    )
    rule = SpareRule(
        tuple(map(Rung, serving.feature_fallback)), serving.last_seen.entities, serving.last_seen.max_age_s
    )
    spares, log = SpareFeatures(readers, workspace.clock, rule), prediction_log(settings, streams, breakers)
    scoring = None if runner is not None else model_runner(workspace)
    predictor = Predictor(
        Stages(
            features=guarded(looking, breakers.of(STORE)),
            router=spare if router is None else guarded(Remote[RouteQuery, Assignment](router), breakers.of(ROUTER)),
            runner=Remote[ScoreQuery, NDArray[float64]](runner) if scoring is None else scoring,
            spare_router=spare,
            at_once=None if scoring is None else scoring.at_once,
        ),
        readers,
        versions,
        log,
        workspace.clock,
        deadline_ms=settings.serving.deadline_ms,
        max_batch_entities=settings.serving.batch_max_entities,
        max_waiting=waiting_limit(settings),
        patience_s=_PATIENCE_S if scoring is not None else _PATIENCE_WITH_HOPS_S,
        breakers=breakers,
        spares=spares,
        ladder=ladder,
        meter=meter,
    )
    for report in (spares.report, batches.report, log.report, *(() if scoring is None else (scoring.report,))):
        meter.board.ask(partial(report, meter.board))
    for model in workspace.definitions.models:
        meter.of(model).expect([*rungs, *rule.rungs, Rung.NULLS])
    waiting = standby(workspace, predictor.prepare, breakers)
    waiting.start()
    backlog = Backlog(streams, stream_names(workspace), meter.board)
    backlog.start()
    intake, keys = Intake.of(workspace, store), key_ring(workspace)

    async def close() -> None:
        if keys is not None:
            await keys.close()
        await waiting.close()
        await backlog.close()
        await predictor.close()
        await streams.aclose()
        await store.aclose()
        workspace.close()

    return Parts(
        settings=settings,
        definitions=workspace.definitions,
        clock=workspace.clock,
        predictor=predictor,
        readers=readers,
        store=store,
        streams=streams,
        intake=intake,
        categories=workspace.categories,
        models=workspace.models,
        metadata=workspace.features.features,
        route=workspace.rollout.current,
        meter=meter,
        keys=keys,
        breakers=breakers,
        close=close,
    )


# ── As deployments ──────────────────────────────────────────────────────────────────


class FeatureLookupReplica:
    """Reads features.

    Args:
        settings: Name the online store and the declarations.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc] # Serve awaits it
        self._workspace = Workspace.open(settings)
        store = AsyncOnlineStore(self._workspace.online_config)
        self._stage = feature_lookup(self._workspace, store)
        # Whoever asks first finds a connection. A store that is away is no reason not to start: it comes back.
        with contextlib.suppress(StorageError):
            await store.ping()

    async def __call__(self, query: FeatureQuery) -> FeatureBlock:
        """See `FeatureLookup`."""
        return await self._stage(query)


class ABRouterReplica:
    """Assigns variants.

    Args:
        settings: Name the catalog.
    """

    def __init__(self, settings: Settings) -> None:
        self._workspace = Workspace.open(settings)
        self._stage = ab_router(self._workspace, breakers_of(settings))

    async def __call__(self, query: RouteQuery) -> Assignment:
        """See `ABRouter`."""
        return await self._stage(query)


class ModelReplica:
    """Scores rows with any version of any model; takes calls once what serves is loaded, or was tried.

    Args:
        settings: Name the catalog and the artifacts.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc] # Serve awaits it
        self._workspace = Workspace.open(settings)
        self._stage = model_runner(self._workspace)
        self._standby = standby(self._workspace, self._stage.loaded, breakers_of(settings))
        self._board = Board()
        self._board.ask(partial(self._stage.report, self._board))
        self._exporter = Exporter(self._board)
        self._exporter.start()
        await self._standby.refresh()
        self._standby.start()

    async def __call__(self, query: ScoreQuery) -> NDArray[float64]:
        """See `ModelRunner`."""
        return await self._stage(query)


class Remote(Generic[QueryT, AnswerT]):
    """A stage in another process, called like one in this.

    Args:
        handle: Leads to its replicas.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def __call__(self, query: QueryT) -> AnswerT:
        """Call the stage.

        Raises:
            HeliostatError: What the stage raised, as it raised it.
        """
        try:
            answer: AnswerT = await self._handle.remote(query)
        except RayTaskError as error:
            if isinstance(error.cause, HeliostatError):
                raise error.cause from None
            raise
        return answer
