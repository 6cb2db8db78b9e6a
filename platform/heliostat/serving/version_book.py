"""What must be known of a model version to ask it, or to do without it: read once, since a version never changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from heliostat.errors import HeliostatError, StaleVersionError
from heliostat.models.packaging import AS_IT_IS, RawScale
from heliostat.serving.lanes import in_thread


@dataclass(frozen=True, slots=True)
class VersionFacts:
    """What must be known of a version to ask for its scores, or to do without them.

    Attributes:
        names: Qualified features, in the order of its matrix.
        prior: Its mean prediction in training; None if nobody wrote it down.
        stale: Views that are declared otherwise now than when it was trained: it can't be asked.
        wanted: What is looked up for them: ``view@version__feature`` where it was trained on another version of
            a view than the highest; by default ``names``.
        scale: What contributions to its predictions are measured in.
        medians: Of ``names`` in training, NaN where there is none; empty if nobody wrote them down.
    """

    names: tuple[str, ...]
    prior: float | None = None
    stale: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()
    scale: RawScale = AS_IT_IS
    medians: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.wanted:
            object.__setattr__(self, "wanted", self.names)


class VersionBook:
    """Facts about versions, each read once.

    Args:
        read: Reads a version's facts from the catalog; may block, and may raise.
    """

    def __init__(self, read: Callable[[str, int], VersionFacts]) -> None:
        self._read = read
        self._known: dict[tuple[str, int], VersionFacts] = {}
        self._reading: dict[tuple[str, int], asyncio.Task[VersionFacts]] = {}

    def known(self, model: str, version: int) -> VersionFacts | None:
        """Facts that were read before."""
        return self._known.get((model, version))

    async def usable(self, model: str, version: int) -> VersionFacts:
        """Facts about a version that can be asked.

        Raises:
            StaleVersionError: If its views are declared otherwise now.
            HeliostatError: If there is no such version, or the catalog can't be read.
        """
        facts = self._known.get((model, version)) or await self._facts(model, version)
        if facts.stale:
            raise StaleVersionError(model, version, facts.stale)
        return facts

    async def prior(self, model: str, version: int) -> float | None:
        """Its mean prediction, None if it isn't known."""
        try:
            return (await self._facts(model, version)).prior
        except HeliostatError:
            return None

    async def _facts(self, model: str, version: int) -> VersionFacts:
        """Facts, read once however many ask; reading goes on if they leave."""
        key = model, version
        known = self._known.get(key)
        if known is not None:
            return known
        task = self._reading.get(key)
        if task is None:
            task = self._reading[key] = asyncio.create_task(in_thread(self._read, model, version))
            task.add_done_callback(lambda done: self._note(key, done))
        return await asyncio.shield(task)

    def _note(self, key: tuple[str, int], done: asyncio.Task[VersionFacts]) -> None:
        del self._reading[key]
        if not done.cancelled() and done.exception() is None:
            self._known[key] = done.result()
