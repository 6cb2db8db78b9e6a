"""API keys, scopes, and how long what a replica knows of them holds."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from heliostat.clock import ManualClock
from heliostat.errors import (
    CatalogUnavailableError,
    InvalidKeyError,
    KeysUnavailableError,
    UnprotectedIngressError,
)
from heliostat.serving.access import (
    CALLER,
    EVERYTHING,
    LOCAL,
    NOBODY,
    Caller,
    KeyRing,
    KnownKey,
    NewKey,
    Scope,
    caller_of,
    check_ingress,
    check_key,
    granted,
    is_loopback,
    new_key,
)


def known(made: NewKey, *scopes: str) -> KnownKey:
    return KnownKey(made.id, Caller("shop", granted(scopes or ["predict"])), bytes.fromhex(made.digest))


# ── Keys and scopes ─────────────────────────────────────────────────────────────────


def test_a_key_is_found_by_scanners_and_kept_as_a_hash_alone() -> None:
    made = [new_key() for _ in range(200)]
    assert all(re.fullmatch(r"hsk_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", each.key) for each in made)
    assert len({each.key.split("_", 2)[2] for each in made}) == 200
    assert all(each.key.endswith(each.last_four) for each in made)
    assert all(each.key not in each.digest and len(each.digest) == 64 for each in made)


def test_a_key_is_accepted_whole_and_refused_with_any_character_changed_or_missing() -> None:
    made = new_key()
    keys = {made.id: known(made)}
    assert check_key(keys, made.key.encode(), 0).name == "shop"
    wrong = [
        made.key[:at] + ("x" if made.key[at] != "x" else "y") + made.key[at + 1 :] for at in range(len(made.key))
    ]
    wrong += [made.key[:-1], made.key + "=", "", "hsk", f"hsk_{made.id}_", f"hsk_{made.id}", "\xff" * 20, "x" * 5_000]
    for each in wrong:
        with pytest.raises(InvalidKeyError, match="isn't known here"):
            check_key(keys, each.encode("latin-1"), 0)


def test_a_key_of_another_id_isnt_accepted_with_this_ones_secret() -> None:
    one, other = new_key(), new_key()
    keys = {each.id: known(each) for each in (one, other)}
    mixed = f"hsk_{one.id}_{other.key.split('_', 2)[2]}"
    with pytest.raises(InvalidKeyError):
        check_key(keys, mixed.encode(), 0)


def test_only_who_has_the_whole_key_learns_that_it_was_revoked_or_has_expired() -> None:
    made = new_key()
    ended = {made.id: replace(known(made), expires_us=1_000_000)}
    assert check_key(ended, made.key.encode(), 999_999).name == "shop"
    with pytest.raises(InvalidKeyError, match=r"has expired \(at 1970-01-01T00:00:01"):
        check_key(ended, made.key.encode(), 1_000_000)
    revoked = {made.id: replace(known(made), revoked=True)}
    with pytest.raises(InvalidKeyError, match="was revoked"):
        check_key(revoked, made.key.encode(), 0)
    for keys in (ended, revoked):
        with pytest.raises(InvalidKeyError, match="isn't known here"):
            check_key(keys, made.key[:-1].encode(), 2_000_000)


def test_admin_includes_every_scope_and_no_other_scope_includes_another() -> None:
    assert granted(["admin"]) == EVERYTHING == frozenset(Scope)
    for scope in set(Scope) - {Scope.ADMIN}:
        assert granted([scope]) == {scope}
    with pytest.raises(ValueError, match="everything"):
        granted(["everything"])


def test_whoever_asks_without_access_control_in_front_gets_nobody() -> None:
    assert caller_of({"type": "http"}) is NOBODY
    assert not any(NOBODY.may(scope) for scope in Scope)
    assert not caller_of({CALLER: "admin"}).may(Scope.ADMIN)
    assert caller_of({CALLER: LOCAL}).may(Scope.ADMIN)
    assert not caller_of({CALLER: Caller("shop", granted(["read"]))}).may(Scope.PREDICT)


# ── The ring ────────────────────────────────────────────────────────────────────────


class Catalog:
    """What a ring reads: slow, away or changed when a test says so."""

    def __init__(self, *keys: KnownKey) -> None:
        self.keys = list(keys)
        self.reads = 0
        self.away = False
        self.reading = threading.Semaphore(0)
        self.open = threading.Event()
        self.open.set()

    async def asked(self) -> None:
        """Once it is read again."""
        await asyncio.to_thread(self.reading.acquire)

    def load(self) -> list[KnownKey]:
        self.reads += 1
        found = list(self.keys)
        self.reading.release()
        assert self.open.wait(20)
        if self.away:
            raise CatalogUnavailableError("postgresql://catalog", "connection refused")
        return found


class Ring:
    """A ring whose time stands still until a test moves it."""

    def __init__(self, catalog: Catalog) -> None:
        self.now_s = 1_000.0
        self.clock = ManualClock(0)
        self.ring = KeyRing(catalog.load, self.clock, within_s=5.0, hold_s=60.0, monotonic=lambda: self.now_s)

    async def ask(self, key: str) -> str:
        """As access control does."""
        if not self.ring.settled():
            await self.ring.settle()
        try:
            return self.ring.caller(key.encode()).name
        except InvalidKeyError as error:
            return error.problem

    async def renewed(self) -> None:
        assert self.ring._renewal is not None
        await self.ring._renewal


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))  # type: ignore[arg-type] # a coroutine function


def test_many_requests_share_one_read_of_the_catalog() -> None:
    made = new_key()
    catalog = Catalog(known(made))
    ring = Ring(catalog)

    async def scenario() -> None:
        assert set(await asyncio.gather(*(ring.ask(made.key) for _ in range(50)))) == {"shop"}
        ring.now_s += 2.4
        for _ in range(50):
            assert await ring.ask(made.key) == "shop"
        assert catalog.reads == 1

    run(scenario)


def test_a_renewal_begins_half_way_and_nobody_waits_for_it() -> None:
    made = new_key()
    catalog = Catalog(known(made))
    ring = Ring(catalog)

    async def scenario() -> None:
        assert await ring.ask(made.key) == "shop"
        catalog.keys, ring.now_s = [replace(known(made), revoked=True)], ring.now_s + 2.6
        catalog.open.clear()
        assert await ring.ask(made.key) == "shop"
        assert ring.ring.settled()
        catalog.open.set()
        await ring.renewed()
        assert await ring.ask(made.key) == "was revoked"
        assert catalog.reads == 2

    run(scenario)


@pytest.mark.parametrize("later_s", [5.0, 5.1, 3_600.0])
def test_a_revoked_key_is_refused_by_the_first_request_after_the_bound_however_quiet_it_was(later_s: float) -> None:
    made = new_key()
    catalog = Catalog(known(made))
    ring = Ring(catalog)

    async def scenario() -> None:
        assert await ring.ask(made.key) == "shop"
        catalog.keys, ring.now_s = [replace(known(made), revoked=True)], ring.now_s + later_s
        assert await ring.ask(made.key) == "was revoked"

    run(scenario)


def test_a_snapshot_is_as_old_as_the_question_and_not_as_its_answer() -> None:
    made = new_key()
    catalog = Catalog(known(made))
    ring = Ring(catalog)

    async def scenario() -> None:
        assert await ring.ask(made.key) == "shop"
        await catalog.asked()
        ring.now_s += 3.0
        catalog.open.clear()
        assert await ring.ask(made.key) == "shop"
        await catalog.asked()
        catalog.keys = [replace(known(made), revoked=True)]  # after it was asked
        ring.now_s += 4.0
        catalog.open.set()
        await ring.renewed()
        ring.now_s += 1.0
        assert await ring.ask(made.key) == "was revoked"

    run(scenario)


def test_while_the_catalog_is_away_known_keys_work_on_and_after_the_bound_none_does() -> None:
    made = new_key()
    catalog = Catalog(known(made))
    ring = Ring(catalog)

    async def scenario() -> None:
        assert await ring.ask(made.key) == "shop"
        catalog.away = True
        for _ in range(11):
            ring.now_s += 5.0
            assert await ring.ask(made.key) == "shop"
            assert await ring.ask(new_key().key) == "isn't known here"
            await ring.renewed()
        ring.now_s += 5.0
        with pytest.raises(KeysUnavailableError, match="60 s"):
            await ring.ask(made.key)
        catalog.away = False
        ring.now_s += 2.0
        assert await ring.ask(made.key) == "shop"

    run(scenario)


def test_a_catalog_that_is_away_from_the_start_lets_nobody_in() -> None:
    made = new_key()
    catalog = Catalog(known(made))
    catalog.away = True
    ring = Ring(catalog)

    async def scenario() -> None:
        for _ in range(3):
            with pytest.raises(KeysUnavailableError):
                await ring.ask(made.key)

    run(scenario)
    assert catalog.reads == 1, "it isn't asked by every request"


def test_a_catalog_that_hangs_is_waited_for_once_and_then_not_any_more() -> None:
    made = new_key()
    catalog = Catalog(known(made))
    ring = Ring(catalog)

    async def scenario() -> None:
        assert await ring.ask(made.key) == "shop"
        await catalog.asked()
        catalog.open.clear()
        ring.now_s += 6.0
        assert not ring.ring.settled()
        ring.now_s += 1.1  # the first request has waited as long as any does
        assert await ring.ask(made.key) == "shop"
        await catalog.asked()
        assert await ring.ask(made.key) == "shop"
        assert catalog.reads == 2
        catalog.open.set()
        await ring.ring.close()

    run(scenario)


def test_a_key_that_expires_needs_no_renewal_to_be_refused() -> None:
    made = new_key()
    catalog = Catalog(replace(known(made), expires_us=10))
    ring = Ring(catalog)

    async def scenario() -> None:
        assert await ring.ask(made.key) == "shop"
        ring.clock.advance(10)
        assert (await ring.ask(made.key)).startswith("has expired")
        assert catalog.reads == 1

    run(scenario)


# ── Who is reached from where ───────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.4.2", "localhost", "::1", "::ffff:127.0.0.1"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    check_ingress("loopback", host, "the ingress")


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "", None, "192.168.1.7", "fd00::1", "example.org", "127.0.0.1.nip.io"],  # noqa: S104 - refused
)
def test_what_other_machines_reach_does_and_the_error_says_what_to_do(host: str | None) -> None:
    assert not is_loopback(host)
    with pytest.raises(
        UnprotectedIngressError, match="(?i)set serving.access to keys.*heliostat keys create"
    ) as told:
        check_ingress("loopback", host, "the ingress")
    assert told.value.exit_code == 2
    check_ingress("keys", host, "the ingress")
