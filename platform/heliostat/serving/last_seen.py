"""What this replica saw last of each entity: features for when the online store doesn't answer.

Remembering is a few array assignments for a whole batch, whatever its size; so there is no list that is
kept in order of use, and who is in which row is only looked up when somebody asks. Two halves take turns: what
is new goes into the young one, and when that is full the old one is forgotten as a whole. An entity that was
among the last ``entities / 2`` rows is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(slots=True, eq=False)
class _Half:
    values: FloatArray
    at_us: NDArray[np.int64]
    used: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    added: list[tuple[int, Sequence[str]]] = field(default_factory=list)
    """What isn't in ``rows`` yet: entities, and the row of their first."""

    @classmethod
    def of(cls, rows: int, columns: int) -> _Half:
        return cls(np.empty((rows, columns)), np.empty(rows, dtype=np.int64))

    def row_of(self, entity: str) -> int | None:
        """The last row of an entity; None if it has none."""
        for first, entities in self.added:
            self.rows.update(zip(entities, range(first, first + len(entities)), strict=True))
        self.added.clear()
        return self.rows.get(entity)

    def forget(self) -> None:
        """Be empty."""
        self.rows.clear()
        self.added.clear()
        self.used = 0


class LastSeen:
    """Feature vectors of the entities that were looked up last, by one set of features.

    Args:
        names: The columns.
        entities: How many vectors are kept at most; an even number.
        max_age_us: Older ones aren't given, microseconds.
    """

    def __init__(self, names: tuple[str, ...], *, entities: int, max_age_us: int) -> None:
        self.names = names
        self._half, self._max_age_us = max(1, entities // 2), max_age_us
        self._young, self._old = (_Half.of(self._half, len(names)) for _ in range(2))

    def keep(self, entities: Sequence[str], values: FloatArray, *, at_us: int) -> None:
        """Remember vectors.

        Args:
            entities: Whose, ``n`` of them.
            values: Shape ``(n, len(names))``.
            at_us: Of which instant, microseconds.
        """
        done = 0
        while done < len(entities):
            young = self._young
            if young.used == self._half:
                young, self._old = self._old, young
                young.forget()
                self._young = young
            n = min(len(entities) - done, self._half - young.used)
            first, last = young.used, young.used + n
            young.values[first:last] = values[done : done + n]
            young.at_us[first:last] = at_us
            young.added.append((first, entities[done : done + n]))
            young.used, done = last, done + n

    def recall(self, entity: str, *, now_us: int) -> tuple[FloatArray, int] | None:
        """The vector of an entity, shape ``(len(names),)``, and its age, microseconds; None if it isn't known."""
        for half in (self._young, self._old):
            row = half.row_of(entity)
            if row is not None:
                age_us = max(0, now_us - int(half.at_us[row]))
                return (half.values[row], age_us) if age_us <= self._max_age_us else None
        return None
