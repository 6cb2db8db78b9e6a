"""Features for when the online store doesn't answer: what was seen last, training medians, or nulls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heliostat.clock import US_PER_S, Clock
from heliostat.features.request import UniformOverrides
from heliostat.serving.fallback import Rung
from heliostat.serving.last_seen import LastSeen
from heliostat.serving.lookup import FeatureBlock, FeatureQuery, FeatureReaders, shown
from heliostat.serving.telemetry import Board

FloatArray = NDArray[np.float64]

EVERY_RUNG = (Rung.LAST_SEEN, Rung.MEDIANS)


@dataclass(frozen=True, slots=True)
class SpareRule:
    """What stands in for features.

    Attributes:
        rungs: `Rung.LAST_SEEN` and `Rung.MEDIANS`, or one of them, or none: then there are nulls.
        entities: How many entities of a model are remembered, at most.
        max_age_s: How old what was seen may be, seconds.
    """

    rungs: tuple[Rung, ...] = EVERY_RUNG
    entities: int = 10_000
    max_age_s: float = 300.0


class SpareFeatures:
    """Remembers what was looked up, and says what it can when nothing can be looked up.

    Args:
        readers: Plans of what is looked up.
        clock: Tells now.
        rule: What stands in.
    """

    def __init__(self, readers: FeatureReaders, clock: Clock, rule: SpareRule | None = None) -> None:
        self._readers, self._clock, self._rule = readers, clock, rule or SpareRule()
        self._seen: dict[str, LastSeen] = {}
        self._hits = self._misses = 0
        self._remembers = Rung.LAST_SEEN in self._rule.rungs and self._rule.entities > 0

    def report(self, board: Board) -> None:
        """Put into numbers how often what was seen last stood in, and how often nothing was known."""
        board.set("heliostat_cache_total", "last_seen_features", "hit", value=self._hits)
        board.set("heliostat_cache_total", "last_seen_features", "miss", value=self._misses)

    def keep(self, query: FeatureQuery, block: FeatureBlock) -> None:
        """Remember what was looked up; not of entities whose features the request gave."""
        if not self._remembers:
            return
        seen = self._seen.get(query.model)
        if seen is None or seen.names != block.names:
            seen = self._seen[query.model] = LastSeen(
                block.names, entities=self._rule.entities, max_age_us=round(self._rule.max_age_s * US_PER_S)
            )
        entities, values = query.entities, block.values
        if isinstance(query.overrides, UniformOverrides):
            return
        if query.overrides:
            own = [row for row in range(len(entities)) if not query.overrides.get(row)]
            entities, values = tuple(entities[row] for row in own), values[own]
        seen.keep(entities, values, at_us=block.as_of_us)

    def block(self, query: FeatureQuery) -> FeatureBlock:
        """Features without the store: what was seen last, over that what the request gives; nulls for the rest."""
        now_us = self._clock.now_us()
        seen = self._seen.get(query.model)
        known: dict[int, FloatArray] = {}
        ages_s: list[float | None] = [None] * len(query.entities)
        if seen is not None and seen.names == query.names:
            for row, entity in enumerate(query.entities):
                found = seen.recall(entity, now_us=now_us)
                if found is not None:
                    known[row], ages_s[row] = found[0], found[1] / US_PER_S
        self._hits += len(known)
        self._misses += len(ages_s) - len(known)
        return self._readers.blank(query, as_of_us=now_us, seen=known, ages_s=ages_s)

    def completed(
        self,
        query: FeatureQuery,
        block: FeatureBlock,
        matrix: FloatArray,
        *,
        names: Sequence[str],
        medians: Sequence[float],
        rows: NDArray[np.intp] | None,
    ) -> tuple[FloatArray, list[Rung]]:
        """A version's matrix with training medians where nothing is known, and the rung of each row.

        Args:
            query: What was asked for.
            block: As `block` made it.
            matrix: The version's columns of it, shape ``(n, n_features)``.
            names: The version's features, as its signature names them.
            medians: Of each of them; NaN where there is none; empty if nobody wrote them down.
            rows: Which of the block's rows these are; None: all.
        """
        places = range(len(matrix)) if rows is None else rows.tolist()
        unknown = np.array([block.ages_s[place] is None for place in places])
        usable = Rung.MEDIANS in self._rule.rungs and len(medians) == matrix.shape[1]
        if usable and unknown.any():
            gaps = np.isnan(matrix) & unknown[:, None]
            given = self._readers.given(query)
            for row, place in enumerate(places):
                if given is not None and unknown[row] and given[place]:  # a null that the request gives is one
                    gaps[row, [at for at, name in enumerate(names) if shown(name) in given[place]]] = False
            matrix = np.where(gaps, np.asarray(medians, dtype=np.float64)[None, :], matrix)
        instead = Rung.MEDIANS if usable else Rung.NULLS
        return matrix, [instead if each else Rung.LAST_SEEN for each in unknown.tolist()]
