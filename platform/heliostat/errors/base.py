"""What every error is."""

from __future__ import annotations

from typing import ClassVar


def listed(names: tuple[str, ...]) -> str:
    """Names for a message."""
    return ", ".join(names) if names else "nothing yet"


def reason_of(error: BaseException) -> str:
    """What any error says, for a message; of one that says nothing, what it is."""
    return str(error) or type(error).__name__


class HeliostatError(Exception):
    """Base of every error that Heliostat raises on purpose."""

    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    @property
    def public_text(self) -> str:
        """What an HTTP client is told: what is wrong with its request, and nothing of the inside.

        Where the fault is the service's own, the text names addresses, folders and what a driver said; that is
        for the log.
        """
        return str(self) if self.http_status < 500 else "something in the service is wrong; its log says what"
