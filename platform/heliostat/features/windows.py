"""The window contract: which events a query at an instant sees. See docs/window-contract.md.

For a query instant ``q``, a window of length ``W`` and a hop ``h`` these are

    floor(q − W, h)  ≤  event_time  <  q

The lower edge is rounded down to the hop, so that rings of tiles can answer it; the upper
edge is exact: an event at the query instant isn't known yet.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from heliostat.clock import US_PER_DAY, US_PER_HOUR, US_PER_MINUTE, format_duration
from heliostat.errors import WindowError

_HOPS_US = ((12 * US_PER_DAY, US_PER_DAY), (12 * US_PER_HOUR, US_PER_HOUR))
_SHORTEST_HOP_US = 5 * US_PER_MINUTE


def default_hop_us(window_us: int) -> int:
    """The hop that follows from a window's length: 1 day, 1 hour or 5 minutes."""
    return next((hop for at_least, hop in _HOPS_US if window_us >= at_least), _SHORTEST_HOP_US)


def check_window(window_us: int, hop_us: int, *, where: str) -> None:
    """Refuse a window that its hop can't answer.

    Raises:
        WindowError: If the hop doesn't divide a day, or the window isn't a multiple of the hop.
    """
    if US_PER_DAY % hop_us:
        raise WindowError(
            f"{where}: the hop {format_duration(hop_us)} doesn't divide a day",
            "use one such as 5m, 15m, 1h, 6h or 1d",
        )
    if window_us <= 0 or window_us % hop_us:
        raise WindowError(
            f"{where}: the window {format_duration(window_us)} isn't a multiple of its hop {format_duration(hop_us)}",
            "lengthen the window to a multiple, or set the view's hop to one that divides it",
        )


def floor_to(instant_us: int, hop_us: int) -> int:
    """The last multiple of the hop at or before an instant."""
    return instant_us - instant_us % hop_us


def tile_of(time_us: NDArray[np.int64], hop_us: int) -> NDArray[np.int64]:
    """The number of the tile that each instant falls into.

    Args:
        time_us: Shape ``(n,)``.
        hop_us: Tile length.

    Returns:
        Shape ``(n,)``; tile ``k`` covers ``[k·hop, (k+1)·hop)``.
    """
    return np.floor_divide(time_us, hop_us)


def lower_edge_us(as_of_us: NDArray[np.int64], window_us: int, hop_us: int) -> NDArray[np.int64]:
    """The first instant inside each window, inclusive.

    Args:
        as_of_us: Query instants, shape ``(n,)``.
        window_us: Window length.
        hop_us: Tile length.

    Returns:
        Shape ``(n,)``.
    """
    return np.floor_divide(as_of_us - window_us, hop_us) * hop_us


def ring_slots(longest_window_us: int, hop_us: int) -> int:
    """How many slots a ring needs so that its longest window never wraps."""
    return longest_window_us // hop_us + 1
