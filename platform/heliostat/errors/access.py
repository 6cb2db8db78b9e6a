"""Requests that aren't allowed, keys that can't be used, and ingresses that mustn't be open."""

from __future__ import annotations

from heliostat.errors.base import HeliostatError, listed
from heliostat.errors.states import ConflictError, NotFoundError
from heliostat.errors.storage import StorageError


class AccessError(HeliostatError):
    """A request isn't allowed; what it asks for may or may not exist."""

    http_status = 401
    exit_code = 5


class MissingKeyError(AccessError):
    """A request carries no API key."""

    def __str__(self) -> str:
        return (
            "an API key is needed; send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`. "
            "Whoever runs this service makes one with `heliostat keys create`"
        )


class InvalidKeyError(AccessError):
    """A request's API key isn't valid, or not any more. The key itself is never repeated."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return (
            f"the API key {self.problem}; send one that is valid. Whoever runs this service sees them with "
            "`heliostat keys list` and makes new ones with `heliostat keys create`"
        )


class MissingScopeError(AccessError):
    """A valid API key doesn't allow what is asked for."""

    http_status = 403

    def __init__(self, needed: str) -> None:
        super().__init__(needed)
        self.needed = needed

    def __str__(self) -> str:
        return f"this needs an API key with scope {self.needed}, and this one doesn't have it; use one that does"


class NotLocalError(AccessError):
    """Without API keys, a request came that this machine's own programs don't send."""

    http_status = 403

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return (
            f"without API keys only requests of the machine itself are answered, and {self.problem}; "
            "set serving.access to keys and make one with `heliostat keys create`"
        )


class KeysUnavailableError(StorageError):
    """API keys can't be checked: the catalog hasn't told of them for too long."""

    def __init__(self, hold_s: float) -> None:
        super().__init__(hold_s)
        self.hold_s = hold_s

    @property
    def public_text(self) -> str:
        """All of it."""
        return str(self)

    def __str__(self) -> str:
        return (
            f"API keys can't be checked: the catalog hasn't answered for {self.hold_s:.0f} s (serving.keys_hold_s); "
            "try again later"
        )


class UnprotectedIngressError(HeliostatError):
    """An ingress that other machines reach was to be opened without access control."""

    exit_code = 2

    def __init__(self, host: str, where: str) -> None:
        super().__init__(host, where)
        self.host, self.where = host, where

    def __str__(self) -> str:
        return (
            f"{self.where} listens on {self.host!r}, which other machines reach, and serving.access is loopback: "
            "everybody there could use it. Set serving.access to keys and make a key with `heliostat keys create`, "
            "or set serving.host to 127.0.0.1"
        )


class UnknownKeyError(NotFoundError):
    """An API key was named that isn't there, or that is revoked already."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(name, known)
        self.name, self.known = name, known

    def __str__(self) -> str:
        return f"there is no API key {self.name!r} that could be revoked; there are: {listed(self.known)}"


class KeyNameTakenError(ConflictError):
    """A new API key was to have the name of one that works."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"an API key {self.name!r} works already; choose another name (both work until the old one is revoked), "
            f"or say first: heliostat keys revoke {self.name}"
        )
