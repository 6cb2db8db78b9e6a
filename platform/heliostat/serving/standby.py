"""What may serve next, loaded before it does; and what served well before, for the ladder.

Each replica looks at the catalog every few seconds, beside the requests. A version that was registered, got an
alias or became a shadow is loaded and tried then, so that the request which first meets it in the routing
document doesn't wait for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from heliostat.errors import HeliostatError
from heliostat.errors.base import reason_of
from heliostat.experiments.rollout import Rollout
from heliostat.models.registry import PRODUCTION, ModelRegistry
from heliostat.serving.breaker import Breaker, guarded
from heliostat.serving.lanes import in_thread

_logger = logging.getLogger("heliostat.serving")

_PREPARE_S = 10.0
_TOLD = (HeliostatError, OSError)


@dataclass(frozen=True, slots=True)
class Standing:
    """What the catalog says about a model's versions.

    Attributes:
        serving: Those of the routing document, shadows included.
        earlier: Those that were in production before, the last one first: a rollback goes back through them.
        coming: Those that may be next: the newest one, and whatever an alias points at.
    """

    serving: tuple[int, ...] = ()
    earlier: tuple[int, ...] = ()
    coming: tuple[int, ...] = ()


class CatalogLook:
    """Reads a model's `Standing` from the catalog; what hasn't changed isn't read again. Blocks.

    Args:
        models: Versions and aliases.
        rollout: Routing documents.
    """

    def __init__(self, models: ModelRegistry, rollout: Rollout) -> None:
        self._models, self._rollout = models, rollout
        self._known: dict[str, tuple[object, Standing]] = {}

    def __call__(self, model: str) -> Standing:
        """Where the model stands.

        Raises:
            CatalogUnavailableError: If the catalog can't be read.
        """
        mark = self._models.mark(model), None if (now := self._rollout.current(model)) is None else now.revision
        known = self._known.get(model)
        if known is not None and known[0] == mark:
            return known[1]
        serving = () if now is None else now.versions
        controls = (row.document["variants"][0]["version"] for row in self._rollout.history(model))
        # A route may have been changed without the alias: what served everybody counts as well.
        earlier = (*self._models.earlier(model, PRODUCTION), *_undone(controls))
        versions = self._models.list(model) if self._models.mark(model)[0] else ()
        coming = (*(each.version for each in versions if each.aliases), *(each.version for each in versions[-1:]))
        found = Standing(serving, _others(earlier, serving[:1]), _others(coming, serving))
        self._known[model] = mark, found
        return found


class Standby:
    """Keeps versions loaded that may be asked next. Belongs to one event loop.

    Args:
        models: Names of the models.
        look: Reads where a model stands; blocks.
        prepare: Does for a version what its first request would wait for.
        breaker: The catalog's.
        every_s: How often the catalog is looked at, seconds.
    """

    def __init__(
        self,
        models: Iterable[str],
        look: Callable[[str], Standing],
        prepare: Callable[[str, int], Awaitable[object]],
        *,
        breaker: Breaker,
        every_s: float = 2.0,
    ) -> None:
        async def ask(model: str) -> Standing:
            async with asyncio.timeout(_PREPARE_S):
                return await in_thread(look, model)

        self._models, self._look, self._prepare, self._every_s = (
            tuple(models),
            guarded(ask, breaker),
            prepare,
            every_s,
        )
        self._standing: dict[str, Standing] = {}
        self._task: asyncio.Task[None] | None = None

    def last_good(self, model: str) -> tuple[int, ...]:
        """The versions that were in production before the one that is, the last one first.

        The one that was at the last look comes first: a promotion since then has made it the one before.
        """
        standing = self._standing.get(model)
        return () if standing is None else (*standing.serving[:1], *standing.earlier)

    def start(self) -> None:
        """Look again and again, from now on."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._go_on())

    async def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def refresh(self) -> None:
        """Look once, and load what is new; whatever fails is left to whoever asks for it."""
        for model in self._models:
            try:
                standing = await self._look(model)
            except _TOLD as error:
                _logger.debug("the catalog can't say what is next of model %s: %s", model, error)
                continue
            if standing == self._standing.get(model):
                continue
            self._standing[model] = standing
            # What serves comes last, so that it is the last to be dropped where memory is short.
            for version in dict.fromkeys((*standing.coming, *standing.earlier[:1], *standing.serving)):
                await self._prepared(model, version)

    async def _prepared(self, model: str, version: int) -> None:
        try:
            async with asyncio.timeout(_PREPARE_S):
                await self._prepare(model, version)
        except Exception as error:  # noqa: BLE001 - whatever a version does, those that serve go on
            _logger.warning("version %d of model %s can't be made ready: %s", version, model, reason_of(error))

    async def _go_on(self) -> None:
        while True:
            try:
                await self.refresh()
            except Exception:
                _logger.exception("looking for what is next failed")
            await asyncio.sleep(self._every_s)


def _undone(controls: Iterable[int]) -> tuple[int, ...]:
    """Those before the last, newest first; a version that comes again undoes what came after it."""
    stack: list[int] = []
    for version in controls:
        if version in stack:
            del stack[stack.index(version) + 1 :]
        else:
            stack.append(version)
    return tuple(reversed(stack[:-1]))


def _others(versions: Iterable[int], but: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(version for version in dict.fromkeys(versions) if version not in but)
