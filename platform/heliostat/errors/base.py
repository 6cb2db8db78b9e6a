"""What every error is."""

from __future__ import annotations

from typing import ClassVar


def listed(names: tuple[str, ...]) -> str:
    """Names for a message."""
    return ", ".join(names) if names else "nothing yet"


class HeliostatError(Exception):
    """Base of every error that Heliostat raises on purpose."""

    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
