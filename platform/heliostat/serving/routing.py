"""The second stage of a prediction: which variant serves which entity."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import (
    HeliostatError,
    InvalidRouteError,
    UnknownAliasError,
    UnknownVariantError,
)
from heliostat.experiments.assignment import RoutingDocument
from heliostat.models.registry import PRODUCTION
from heliostat.serving.breaker import Breaker, guarded
from heliostat.serving.lanes import in_thread

_logger = logging.getLogger("heliostat.serving")

OUTSIDE_NAME = "outside"
"""The variant of entities outside of the experiment: the control's version serves them, and nobody counts them."""


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
        chosen: Index into both, shape ``(n,)``; -1 stands for the last one.
        shadow: Versions to score and log besides.
    """

    revision: int
    names: tuple[str, ...]
    versions: tuple[int, ...]
    chosen: NDArray[np.int16]
    shadow: tuple[int, ...] = ()

    def taken(self, rows: NDArray[np.intp]) -> Assignment:
        """Of other entities: some of these, in any order, as often as wanted."""
        return replace(self, chosen=self.chosen[rows])

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


class SeenRoutes:
    """Routing documents as the online store held them a moment ago. Belongs to one event loop.

    Args:
        hold_s: How long a moment is, seconds.
    """

    def __init__(self, hold_s: float = 1.0) -> None:
        self._hold_s = hold_s
        self._seen: dict[str, tuple[bytes, float]] = {}

    def see(self, model: str, document: bytes | None) -> None:
        """Remember what the store holds now; None: nothing, or nobody knows."""
        if document is None:
            self._seen.pop(model, None)
        else:
            self._seen[model] = document, asyncio.get_running_loop().time()

    def recent(self, model: str) -> bytes | None:
        """What it held a moment ago, if that was seen."""
        document, seen_at = self._seen.get(model) or (None, -math.inf)
        return document if asyncio.get_running_loop().time() < seen_at + self._hold_s else None


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
        return Assignment(
            revision=route.revision,
            names=(*(variant.name for variant in route.variants), OUTSIDE_NAME),
            versions=(*(variant.version for variant in route.variants), route.control.version),
            chosen=route.assign(query.entities),
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
