"""What every aggregation function declares: an input, a condition and a window. Pure.

The functions themselves are in `heliostat.features.aggregations`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.clock import US_PER_DAY, format_duration, parse_duration_us
from heliostat.errors import InvalidDefinitionError, WindowError
from heliostat.features.inputs import ColumnLike, FloatArray, Input, text_of
from heliostat.features.states import State
from heliostat.features.windows import check_window, default_hop_us


@dataclass(frozen=True, eq=False)
class Aggregation:
    """Base of all aggregation functions.

    Args:
        column: Column name or `pyarrow.compute` expression of numbers or booleans.
        window: Length such as ``"30d"``; None means lifetime.
        windows: Several lengths at once: a view makes a feature of each, ``spend`` over
            ``("7d", "30d")`` becomes ``spend_7d`` and ``spend_30d``.
        where: Only events that meet this `pyarrow.compute` expression count.
        description: One line for the registry.
    """

    column: ColumnLike | None = None
    window: str | None = field(default=None, kw_only=True)
    windows: Sequence[str] | None = field(default=None, kw_only=True, repr=False)
    where: pc.Expression | None = field(default=None, kw_only=True)
    description: str = field(default="", kw_only=True)
    hop_us: int | None = field(default=None, kw_only=True, repr=False)

    needs_column: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.needs_column and self.column is None:
            raise InvalidDefinitionError(
                self.function,
                "it needs a column or an expression",
                f'write {self.function}("amount", window="30d")',
            )
        if self.column is not None and not isinstance(self.column, str | pc.Expression):
            raise InvalidDefinitionError(
                self.function,
                f"{self.column!r} is no column",
                "give a column name or a pyarrow.compute expression",
            )
        if self.where is not None and not isinstance(self.where, pc.Expression):
            raise InvalidDefinitionError(
                self.function,
                f"where={self.where!r} is no expression",
                'write one such as pyarrow.compute.field("type") == "purchase"',
            )
        if self.windows is not None:
            self._check_windows(self.windows)
        if self.window is not None:
            parse_duration_us(self.window)

    def _check_windows(self, windows: Sequence[str]) -> None:
        if self.window is not None:
            raise WindowError(f"{self.function} has a window and windows", "give one of them")
        if isinstance(windows, str) or not windows:
            raise WindowError(
                f"{self.function} has windows={windows!r}, which is no list", 'write windows=("7d", "30d")'
            )
        for each in windows:
            parse_duration_us(each)

    @property
    def function(self) -> str:
        """The function's name: ``Count``."""
        return type(self).__name__

    @property
    def window_us(self) -> int | None:
        """The window's length in microseconds; None means lifetime."""
        return None if self.window is None else parse_duration_us(self.window)

    takes_texts: ClassVar[bool] = False
    """Whether its column may hold texts; the feature is a category then (`heliostat.schema.text_codes`)."""

    @property
    def input(self) -> Input:
        """What it looks at."""
        return Input(self.column, self.where, texts=self.takes_texts)

    def named(self, name: str) -> Iterator[tuple[str, Self]]:
        """The features that one declaration stands for: itself, or one for each of its windows.

        Args:
            name: The declared name; the window is appended to it where there are several.
        """
        if self.windows is None:
            yield name, self
            return
        for window in self.windows:
            yield f"{name}_{''.join(window.split())}", replace(self, window=window, windows=None)

    def bound(self, *, where: pc.Expression | None, hop_us: int | None, at: str) -> Self:
        """The same aggregation inside a view: with the view's condition and hop.

        Args:
            where: The view's own condition, joined by *and*.
            hop_us: The view's hop, or None for the one that follows from the window.
            at: How messages name the place.

        Raises:
            WindowError: If the window doesn't fit the hop.
        """
        condition = self.where if where is None else where if self.where is None else where & self.where
        window_us = self.window_us
        if window_us is None:
            return replace(self, where=condition, hop_us=US_PER_DAY)
        hop = self._hop_us(window_us, hop_us)
        check_window(window_us, hop, where=at)
        return replace(self, where=condition, hop_us=hop)

    def _hop_us(self, window_us: int, hop_us: int | None) -> int:
        return hop_us or default_hop_us(window_us)

    def states(self) -> tuple[State, ...]:
        """What it keeps of events."""
        raise NotImplementedError

    def finalize(self, parts: Sequence[FloatArray], *, as_of_us: NDArray[np.int64] | int) -> FloatArray:
        """The feature's value from merged states.

        Args:
            parts: One array a state, in the order of `states`: shape ``(n,)``, or ``(n, 3)`` for
                ``first`` and ``last`` (event time, tie, value).
            as_of_us: Query instant, for all or for each, microseconds.

        Returns:
            Shape ``(n,)``; NaN where the function of nothing is null.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """A JSON document with all that the value depends on."""
        hop = {} if self.hop_us is None or self.window is None else {"hop": format_duration(self.hop_us)}
        window = None if self.window_us is None else format_duration(self.window_us)
        return {
            "function": self.function,
            "column": text_of(self.column),
            "where": text_of(self.where),
            "window": window,
            **hop,
        }
