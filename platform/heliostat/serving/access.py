"""Who may do what: API keys, their scopes, and whom a request comes from.

The pure part of access control; `deployments.access` puts it in front of the gateway, in every
replica. What that leaves for whoever answers a request is a `Caller`:

    from heliostat.serving.access import Scope, caller_of

    if "forced-variant" asked for and not caller_of(request.scope).may(Scope.ADMIN): refuse

`caller_of` never fails and never gives more than the request's key allows: where no access
control stood in front, or a path that is open was asked for without a key, it is `NOBODY`, who may nothing. Where
``serving.access`` is ``loopback``, every request that gets through is `LOCAL`'s, who may everything.

A key is ``hsk_ID_SECRET``: twelve hexadecimal digits to find it by, then 256 random bits. The
prefix lets scanners of source code and logs find keys that got there.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import hmac
import ipaddress
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from heliostat.clock import Clock, format_instant
from heliostat.errors import InvalidKeyError, KeysUnavailableError, UnprotectedIngressError

_logger = logging.getLogger("heliostat.access")

_PREFIX: Final = "hsk"
_ID_BYTES: Final = 6
_SECRET_BYTES: Final = 32
_LONGEST_KEY_BYTES: Final = 128
_UNKNOWN: Final = "isn't known here"
# How long a request waits for the catalog, and how soon it is asked again after it failed.
_WAIT_S: Final = 1.0
_PAUSE_S: Final = 1.0

CALLER: Final = "heliostat.caller"
"""Under this key of an ASGI scope access control leaves the request's `Caller`."""


class Scope(StrEnum):
    """What a key allows."""

    READ = "read"
    PREDICT = "predict"
    INGEST = "ingest"
    ADMIN = "admin"


EVERYTHING: Final = frozenset(Scope)


def granted(scopes: Iterable[str]) -> frozenset[Scope]:
    """What a key with these scopes may do: ``admin`` includes all others.

    Raises:
        ValueError: If one of them is no scope.
    """
    given = frozenset(map(Scope, scopes))
    return EVERYTHING if Scope.ADMIN in given else given


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a request comes from.

    Attributes:
        name: The key's name; empty if there is none.
        scopes: What that key allows, with all that ``admin`` includes.
    """

    name: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        """Whether it is allowed to."""
        return scope in self.scopes


NOBODY: Final = Caller("", frozenset())
"""Has shown no key."""

LOCAL: Final = Caller("", EVERYTHING)
"""A program of this machine, where ``serving.access`` is ``loopback``."""


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """Whom a request comes from.

    Args:
        scope: Its ASGI scope: ``request.scope``.
    """
    found = scope.get(CALLER, NOBODY)
    return found if isinstance(found, Caller) else NOBODY


# ── Keys ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: the only time that it is whole.

    Attributes:
        key: What its owner sends.
        id: What it is found by; its public part.
        digest: What is kept of it.
        last_four: Its end, for people to tell keys apart by.
    """

    key: str
    id: str
    digest: str
    last_four: str


def new_key() -> NewKey:
    """Make a key from the system's randomness."""
    key_id = secrets.token_hex(_ID_BYTES)
    key = f"{_PREFIX}_{key_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    return NewKey(key, key_id, digest_of(key.encode()).hex(), key[-4:])


def digest_of(key: bytes) -> bytes:
    """What is kept of a key: its SHA-256, 32 bytes.

    A slow, salted hash is for passwords, which people choose: there are few enough of them to try all. A
    key has 256 random bits, so that no amount of trying finds one from its hash, and no two have the same.
    What a slow hash would cost is real: milliseconds of every request.
    """
    return hashlib.sha256(key).digest()


_NO_DIGEST: Final = digest_of(secrets.token_bytes(_SECRET_BYTES))


@dataclass(frozen=True, slots=True)
class KnownKey:
    """What a replica knows of a key.

    Attributes:
        id: What it is found by.
        caller: Whose requests carry it, and what they may.
        digest: Of the whole key, 32 bytes.
        expires_us: When it stops, microseconds since the epoch; None: never.
        revoked: Whether it was stopped.
    """

    id: str
    caller: Caller
    digest: bytes
    expires_us: int | None = None
    revoked: bool = False


def check_key(known: Mapping[str, KnownKey], presented: bytes, now_us: int) -> Caller:
    """Whom a key belongs to.

    Takes as long for a key that isn't known as for a wrong secret. Only who has the whole key learns that
    it has expired or was revoked.

    Args:
        known: All keys, by id.
        presented: What the request carries.
        now_us: The present, microseconds since the epoch.

    Raises:
        InvalidKeyError: If it isn't known, was revoked, or has expired.
    """
    if len(presented) > _LONGEST_KEY_BYTES:
        raise InvalidKeyError(_UNKNOWN)
    parts = presented.split(b"_", 2)
    found = known.get(parts[1].decode("latin-1")) if len(parts) == 3 else None
    same = hmac.compare_digest(digest_of(presented), _NO_DIGEST if found is None else found.digest)
    if found is None or not same:
        raise InvalidKeyError(_UNKNOWN)
    if found.revoked:
        raise InvalidKeyError("was revoked")
    if found.expires_us is not None and now_us >= found.expires_us:
        raise InvalidKeyError(f"has expired (at {format_instant(found.expires_us)})")
    return found.caller


class KeyRing:
    """The keys as a replica knows them: a snapshot of the catalog, so that requests don't ask it.

    A snapshot is used for ``within_s`` from the instant at which it was asked for. From half of that on, the
    next request starts a renewal beside it; a request that finds it older waits for the renewal. So a key that
    was revoked is refused by every request that begins ``within_s`` later or more, also by the first one
    after a quiet night, as long as the catalog answers.

    While it doesn't, the last snapshot holds for ``hold_s``, and no request waits for a catalog that is known
    to be away; after that no key is accepted until it answers again. Use it on one event loop.

    Args:
        load: Reads all keys; blocks; raises a StorageError if the catalog is away.
        clock: Tells when keys expire.
        within_s: How long a snapshot may be used, seconds.
        hold_s: How long it may be used while the catalog is away, seconds.
        monotonic: Seconds of a clock that is never set.
    """

    def __init__(
        self,
        load: Callable[[], Iterable[KnownKey]],
        clock: Clock,
        *,
        within_s: float,
        hold_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load, self._clock, self._monotonic = load, clock, monotonic
        self._within_s, self._hold_s = within_s, max(hold_s, within_s)
        self._keys: dict[str, KnownKey] = {}
        self._as_of = -math.inf
        self._begun = -math.inf
        self._next_try = -math.inf
        self._away = False
        self._renewal: asyncio.Task[None] | None = None

    def caller(self, presented: bytes) -> Caller:
        """Whom a key belongs to, by the present snapshot: see `settled`.

        Raises:
            InvalidKeyError: If it isn't known, was revoked, or has expired.
        """
        return check_key(self._keys, presented, self._clock.now_us())

    def settled(self) -> bool:
        """Whether the snapshot may be used at once; if not, `settle` first. Starts a renewal when one is due."""
        age_s = self._monotonic() - self._as_of
        if age_s < self._within_s / 2:
            return True
        self._renew()
        return age_s < self._within_s

    async def settle(self) -> None:
        """Wait for the renewal, but not for a catalog that is away.

        Raises:
            KeysUnavailableError: If the last snapshot is too old even for that.
        """
        renewal = self._renewal
        left_s = self._begun + _WAIT_S - self._monotonic()
        if renewal is not None and not renewal.done() and left_s > 0:
            await asyncio.wait({renewal}, timeout=left_s)
        if self._monotonic() - self._as_of >= self._hold_s:
            raise KeysUnavailableError(self._hold_s)

    async def close(self) -> None:
        """Wait for a renewal that is under way, a moment."""
        if self._renewal is not None and not self._renewal.done():
            await asyncio.wait({self._renewal}, timeout=_WAIT_S)

    def _renew(self) -> None:
        now = self._monotonic()
        if now < self._next_try or (self._renewal is not None and not self._renewal.done()):
            return
        self._begun = now
        # In a context of its own: it outlives the request that happened to start it.
        self._renewal = asyncio.get_running_loop().create_task(self._read(now), context=contextvars.Context())

    async def _read(self, as_of: float) -> None:
        try:
            found = {each.id: each for each in await asyncio.to_thread(self._read_all)}
        except Exception as error:  # noqa: BLE001 - whatever is wrong, requests go on with what is known
            self._next_try = self._monotonic() + _PAUSE_S
            if not self._away:
                self._away = True
                _logger.warning("API keys stay as they were known, for %.0f s at most: %s", self._hold_s, error)
            return
        self._keys, self._as_of = found, as_of
        if self._away:
            self._away = False
            _logger.warning("API keys are up to date again")

    def _read_all(self) -> list[KnownKey]:
        return list(self._load())


# ── Who is reached from where ───────────────────────────────────────────────────────


def is_loopback(host: str | None) -> bool:
    """Whether an address or name is this machine alone."""
    if host in ("127.0.0.1", "localhost", "::1"):
        return True
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def check_ingress(access: str, host: str | None, where: str) -> None:
    """Refuse an ingress that other machines reach and that asks for no keys.

    Args:
        access: ``serving.access``.
        host: The address that is listened on; None: all of the machine's.
        where: What listens there, or would.

    Raises:
        UnprotectedIngressError: If it is one.
    """
    if access != "keys" and not is_loopback(host):
        raise UnprotectedIngressError(host or "all interfaces", where)
