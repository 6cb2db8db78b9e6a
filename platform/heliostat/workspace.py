"""Everything that the settings name, opened: the one place where stores are put together.

Shells open a `Workspace` and hand its parts on. Ray tasks and Serve replicas get
`Workspace.settings`, in which the embedded server's address is already written, and open
their own.
"""

from __future__ import annotations

import importlib
import sys
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from heliostat.clock import Clock
from heliostat.errors import DefinitionError, HeliostatError, MissingFileError, RolloutError
from heliostat.experiments.rollout import Rollout
from heliostat.features.categories import CategoryDictionary
from heliostat.features.registry import FeatureRegistry
from heliostat.models.definitions import Definitions
from heliostat.models.registry import ModelRegistry
from heliostat.settings import Settings
from heliostat.storage.artifact_store import ArtifactStore
from heliostat.storage.catalog import Catalog
from heliostat.storage.catalog_tables import AliasRow
from heliostat.storage.embedded import EmbeddedServer
from heliostat.storage.event_log import EventLog
from heliostat.storage.offline_store import OfflineStore
from heliostat.storage.online_store import OnlineConfig, OnlineStore
from heliostat.storage.streams import Streams


class Workspace:
    """The stores, registries and declarations of one project; each opened when first used.

    Args:
        settings: What to open.

    Use `open`, or as a context manager: closing lets go of the embedded server, and the last
    one out stops it.
    """

    def __init__(self, settings: Settings) -> None:
        self._given = settings
        self._server: EmbeddedServer | None = None
        self.clock: Clock = settings.open_clock()

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Open the workspace of these settings, creating its home if there is none."""
        settings.home.mkdir(parents=True, exist_ok=True)
        return cls(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close what was opened."""
        opened = vars(self)
        for name in ("online", "streams", "catalog"):
            if name in opened:
                opened.pop(name).close()
        if self._server is not None:
            self._server.close()
            self._server = None
            opened.pop("settings", None)

    @property
    def configured(self) -> Settings:
        """The settings as they were given: for work that doesn't touch the online store, and so needn't start it."""
        return self._given

    @cached_property
    def settings(self) -> Settings:
        """The settings, with the address of the online store written in: what other processes need."""
        if self._given.online.url is not None:
            return self._given
        self._server = EmbeddedServer.ensure(self._given.home, fsync=self._given.online.fsync)
        online = self._given.online.model_copy(update={"url": self._server.url})
        return self._given.model_copy(update={"online": online})

    @cached_property
    def definitions(self) -> Definitions:
        """What the definitions module declares."""
        return load_definitions(self._given.definitions)

    @cached_property
    def catalog(self) -> Catalog:
        """Versions, aliases, lineage, experiments and verdicts."""
        return Catalog.open(self._given.catalog_url)

    @cached_property
    def categories(self) -> CategoryDictionary:
        """The texts of categorical features."""
        return CategoryDictionary(lambda: self.catalog, self.definitions.views.values(), self.clock)

    @cached_property
    def event_log(self) -> EventLog:
        """All events, bucketed by entity."""
        return EventLog(self._given.data_root, self._given.storage.options, self._given.storage.buckets)

    @cached_property
    def offline_store(self) -> OfflineStore:
        """Feature snapshots, predictions and dead letters."""
        return OfflineStore(self._given.data_root, self._given.storage.options)

    @cached_property
    def artifacts(self) -> ArtifactStore:
        """Model files by content."""
        return ArtifactStore(f"{self._given.data_root.rstrip('/')}/artifacts", self._given.storage.options)

    @cached_property
    def online_config(self) -> OnlineConfig:
        """How to reach the online store; the embedded server is started if it is the one."""
        return OnlineConfig.of(self.settings)

    @cached_property
    def online(self) -> OnlineStore:
        """The rings, routing documents and caches."""
        return OnlineStore(self.online_config)

    @cached_property
    def streams(self) -> Streams:
        """The durable buffer in front of the Delta tables."""
        return Streams.open(self.settings)

    @cached_property
    def features(self) -> FeatureRegistry:
        """Registered feature views."""
        return FeatureRegistry(self.catalog, self.clock)

    def retired_views(self) -> frozenset[str]:
        """References of the versions of views that were registered once, and that nobody declares any more."""
        return frozenset(self.features.retired_views()) - self.definitions.views.keys()

    @cached_property
    def models(self) -> ModelRegistry:
        """Registered model versions and their aliases."""
        return ModelRegistry(self.catalog, self.artifacts, self.clock)

    @cached_property
    def rollout(self) -> Rollout:
        """Which version serves whom; changes are published to where requests read them."""
        return Rollout(self.catalog, self.clock, self._publish_route)

    def promote(self, model: str, version: int, *, reason: str, **how: Any) -> AliasRow:  # noqa: ANN401 - passed on
        """Make a version the one in production and let it serve everybody, with the next request.

        Args:
            model: The model's name.
            version: Which one.
            reason: Why, in a sentence.
            how: As `ModelRegistry.promote` takes it.

        Raises:
            RolloutError: If a split is running: it has to end first, by `Rollout.stop` or a rollback.
            HeliostatError: As `ModelRegistry.promote`.
        """
        running = self.rollout.current(model)
        if running is not None and running.is_split:
            raise RolloutError(model, f"promote version {version}", "a split is running", "stop it, or roll back")
        alias = self.models.promote(model, version, reason=reason, **how)
        self.rollout.serve(model, alias.version, reason=reason or "promoted")
        return alias

    def roll_back(self, model: str, *, reason: str) -> AliasRow:
        """Let the version before serve everybody again; a running split ends.

        Raises:
            HeliostatError: As `ModelRegistry.rollback`.
        """
        alias = self.models.rollback(model, reason=reason)
        self.rollout.serve(model, alias.version, reason=reason, end_split=True)
        return alias

    def _publish_route(self, model: str, document: bytes) -> None:
        self.online.put_many({self.online.keys.route(model): document})


def load_definitions(module: str) -> Definitions:
    """Import a definitions module and collect what it declares.

    Args:
        module: Dotted name, importable from where the command runs: ``configs.churn.definitions``.

    Raises:
        MissingFileError: If there is no such module.
        DefinitionError: If a declaration in it doesn't fit.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        raise MissingFileError(module, "set `definitions` to a Python module with declarations") from None
    except HeliostatError:
        raise
    except SyntaxError as error:
        raise DefinitionError(f"{module}, line {error.lineno}: {error.msg}; correct the file") from None
    return Definitions.of(list(vars(loaded).values()))
