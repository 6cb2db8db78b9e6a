"""Time: int64 microseconds since the epoch, UTC, and the clocks that tell it.

Every module that needs the present takes a `Clock`; the wall clock is read in
`SystemClock` alone. A timestamp without a zone is UTC.
"""

from __future__ import annotations

import json
import os
import re
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Protocol

from heliostat.errors import InvalidValueError, WindowError

US_PER_MS = 1_000
US_PER_S = 1_000_000
US_PER_MINUTE = 60 * US_PER_S
US_PER_HOUR = 3_600 * US_PER_S
US_PER_DAY = 86_400 * US_PER_S

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNITS_US = {"us": 1, "ms": US_PER_MS, "s": US_PER_S, "m": US_PER_MINUTE, "h": US_PER_HOUR, "d": US_PER_DAY}
_DURATION = re.compile(r"^\s*(\d+)\s*(us|ms|s|m|h|d|w)\s*$")


class Clock(Protocol):
    """Tells the present."""

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC."""
        ...


class SystemClock:
    """The machine's clock: the only reader of it."""

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC."""
        return time.time_ns() // 1_000  # noqa: TID251 - this is the one place


class ManualClock:
    """A clock that moves only when told to; for tests and for recomputation.

    Args:
        now_us: Where it starts, microseconds since the epoch.
    """

    def __init__(self, now_us: int = 0) -> None:
        self._now_us = now_us

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC."""
        return self._now_us

    def set(self, now_us: int) -> None:
        """Jump to an instant."""
        self._now_us = now_us

    def advance(self, by_us: int) -> None:
        """Move forward."""
        self._now_us += by_us


class ReplayClock:
    """A clock that runs in another time, so that old data are served as if they were new.

    It shows ``origin_us`` when the system's clock shows ``anchor_us``, and runs ``speed``
    times as fast from there.

    Args:
        origin_us: The instant that is replayed, microseconds since the epoch.
        anchor_us: The system's instant that stands for it.
        speed: Replayed seconds a real second.
    """

    def __init__(self, origin_us: int, anchor_us: int, *, speed: float = 1.0) -> None:
        self.origin_us, self.anchor_us, self.speed = origin_us, anchor_us, speed
        self._system = SystemClock()

    @classmethod
    def anchored(cls, origin_us: int, anchor_file: Path, *, speed: float = 1.0) -> ReplayClock:
        """A replay clock that agrees with every other process of the same home.

        The first process to ask writes the anchor; a changed origin or speed starts a new one.

        Args:
            origin_us: The instant that is replayed.
            anchor_file: Where the anchor is kept.
            speed: Replayed seconds a real second.
        """
        wanted = {"origin_us": origin_us, "speed": speed}
        try:
            kept = json.loads(anchor_file.read_bytes())
            if {name: kept.get(name) for name in wanted} == wanted:
                return cls(origin_us, int(kept["anchor_us"]), speed=speed)
        except (FileNotFoundError, ValueError, KeyError):
            pass
        anchor_us = SystemClock().now_us()
        anchor_file.parent.mkdir(parents=True, exist_ok=True)
        draft = anchor_file.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps({**wanted, "anchor_us": anchor_us}))
        draft.replace(anchor_file)
        return cls(origin_us, int(json.loads(anchor_file.read_bytes())["anchor_us"]), speed=speed)

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC."""
        return self.origin_us + int((self._system.now_us() - self.anchor_us) * self.speed)


def parse_duration_us(value: str | timedelta) -> int:
    """Read a duration such as ``"30d"``, ``"12h"``, ``"5m"``, ``"10s"``, ``"250ms"``, ``"2w"``.

    Returns:
        Microseconds, above zero.

    Raises:
        WindowError: If it can't be read or isn't above zero.
    """
    if isinstance(value, timedelta):
        length_us = value // timedelta(microseconds=1)
    else:
        found = _DURATION.match(value) if isinstance(value, str) else None
        if found is None:
            raise WindowError(f"{value!r} is no duration", "write a number and a unit: 30d, 12h, 5m, 10s, 250ms, 2w")
        number, unit = int(found[1]), found[2]
        length_us = number * (7 * US_PER_DAY if unit == "w" else _UNITS_US[unit])
    if length_us <= 0:
        raise WindowError(f"the duration {value!r} isn't above zero", "give a longer one")
    return length_us


def format_duration(length_us: int) -> str:
    """The shortest text that `parse_duration_us` reads back: ``30d``, ``90m``."""
    for unit in ("d", "h", "m", "s", "ms"):
        if length_us % _UNITS_US[unit] == 0:
            return f"{length_us // _UNITS_US[unit]}{unit}"
    return f"{length_us}us"


def parse_instant_us(value: str | datetime | date | int) -> int:
    """Read an instant: ISO 8601 text, a date, a datetime, or microseconds.

    Without a zone it is UTC.

    Raises:
        InvalidValueError: If the text is no instant.
    """
    if isinstance(value, bool):
        raise InvalidValueError("instant", str(value), "an ISO 8601 instant such as 1998-07-01T00:00:00Z")
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            raise InvalidValueError(
                "instant", str(value), "an ISO 8601 instant such as 1998-07-01 or 1998-07-01T12:30:00Z"
            ) from None
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC)
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    return (value - _EPOCH) // timedelta(microseconds=1)


def format_instant(instant_us: int) -> str:
    """ISO 8601 text, UTC: ``1998-07-01T00:00:00Z``."""
    return to_datetime(instant_us).isoformat().replace("+00:00", "Z")


def to_datetime(instant_us: int) -> datetime:
    """The same instant as a datetime with zone UTC."""
    return _EPOCH + timedelta(microseconds=instant_us)
