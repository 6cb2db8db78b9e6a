from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from heliostat.errors import DependencyOpenError, OnlineStoreUnavailableError, UnknownVersionError
from heliostat.serving.breaker import Breaker, BreakerRule, Breakers, State, guarded

RULE = BreakerRule(failures=3, open_s=1.0, max_open_s=8.0)


class Watch:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class AnyHistory(RuleBasedStateMachine):
    """Callers who ask, report late, twice or never, in any order and at any time."""

    permits = Bundle("permits")

    def __init__(self) -> None:
        super().__init__()
        self.watch = Watch()
        self.breaker = Breaker("store", RULE, self.watch)
        self.opened_at = 0.0
        self.trial_at = -1e9

    @rule(target=permits)
    def ask(self) -> int | None:
        before = self.breaker.state
        shut = self.breaker.is_shut_off
        permit = self.breaker.enter()
        assert (permit is None) == shut
        if before is State.CLOSED:
            assert permit is not None
        if permit is not None and before is not State.CLOSED:
            assert self.breaker.state is State.HALF_OPEN
            assert self.watch.now - self.opened_at >= RULE.open_s, "it was tried too early"
            assert self.watch.now - self.trial_at >= RULE.open_s, "two trials at once"
            self.trial_at = self.watch.now
        return permit

    @rule(permit=permits, good=st.booleans())
    def report(self, permit: int | None, good: bool) -> None:
        if permit is None:
            return
        before = self.breaker.state
        stale = permit != self.breaker._epoch
        if good:
            self.breaker.succeeded(permit)
        else:
            self.breaker.failed(permit, "why")
        after = self.breaker.state
        if stale:
            assert after is before, "a report from before the last change has no say"
        elif before is State.HALF_OPEN:
            assert after is (State.CLOSED if good else State.OPEN)
        elif good:
            assert after is State.CLOSED
        if after is State.OPEN and before is not State.OPEN:
            self.opened_at = self.watch.now

    @rule(permit=consumes(permits))
    def forget(self, permit: int | None) -> None:
        """Whoever held it never comes back."""

    @rule(seconds=st.sampled_from([0.0, 0.125, 0.5, 1.0, 2.5, 8.0]))
    def wait(self, seconds: float) -> None:
        self.watch.now += seconds

    @invariant()
    def it_is_never_shut_off_for_longer_than_the_longest_while(self) -> None:
        assert self.breaker.opens_in_s <= RULE.max_open_s

    @invariant()
    def its_prospect_is_open_as_long_as_it_opened_for_and_nobody_is_let_through(self) -> None:
        prospect = self.breaker.prospect
        assert (prospect is State.CLOSED) == (self.breaker.state is State.CLOSED)
        if prospect is State.OPEN:
            assert self.breaker.is_shut_off


AnyHistory.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyHistory = AnyHistory.TestCase


def failing(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        permit = breaker.enter()
        assert permit is not None
        breaker.failed(permit, "refused")


def test_it_opens_after_so_many_failures_in_a_row_and_a_success_between_them_starts_anew() -> None:
    breaker = Breaker("store", RULE, Watch())
    failing(breaker, 2)
    permit = breaker.enter()
    assert permit is not None
    breaker.succeeded(permit)
    failing(breaker, 2)
    assert breaker.state is State.CLOSED
    failing(breaker, 1)
    assert (breaker.state, breaker.enter(), breaker.reason) == (State.OPEN, None, "refused")


def test_each_trial_that_fails_doubles_the_wait_up_to_a_limit_and_one_that_succeeds_resets_it() -> None:
    watch = Watch()
    breaker = Breaker("store", RULE, watch)
    failing(breaker, 3)
    waits = []
    for _ in range(6):
        waits.append(breaker.opens_in_s)
        watch.now += breaker.opens_in_s
        failing(breaker, 1)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    watch.now += 8.0
    permit = breaker.enter()
    assert (permit is not None, breaker.enter(), breaker.state) == (True, None, State.HALF_OPEN)
    breaker.succeeded(permit or 0)
    assert breaker.state is State.CLOSED
    failing(breaker, 3)
    assert breaker.opens_in_s == 1.0


def test_of_one_that_nobody_asks_any_more_it_isnt_said_for_ever_that_it_is_open() -> None:
    watch = Watch()
    breakers = Breakers(RULE, watch)
    failing(breakers.of("model churn/2"), 3)
    assert breakers.states() == {"model churn/2": State.OPEN}
    watch.now += 1.0
    assert breakers.states() == {"model churn/2": State.HALF_OPEN}
    failing(breakers.of("model churn/2"), 1)
    assert breakers.states() == {"model churn/2": State.OPEN}


def test_a_guarded_call_is_refused_at_once_while_the_breaker_is_open_and_says_why() -> None:
    calls = 0

    async def call(_: int) -> int:
        nonlocal calls
        calls += 1
        raise OnlineStoreUnavailableError("redis://x", "connection refused")

    async def scenario() -> None:
        breaker = Breakers(RULE).of("online_store")
        ask = guarded(call, breaker)
        for _ in range(3):
            with pytest.raises(OnlineStoreUnavailableError):
                await ask(1)
        for _ in range(50):
            with pytest.raises(DependencyOpenError, match=r"online_store failed \(.*connection refused"):
                await ask(1)

    asyncio.run(scenario())
    assert calls == 3


def test_a_call_that_times_out_is_a_failure_and_what_the_caller_did_wrong_is_none() -> None:
    async def hang(_: int) -> None:
        await asyncio.Event().wait()

    async def wrong(_: int) -> None:
        raise UnknownVersionError("churn", "9", ("1",))

    async def scenario() -> None:
        breakers = Breakers(RULE)
        slow, sound = breakers.of("slow"), breakers.of("sound")
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await guarded(hang, slow)(1)
            with pytest.raises(UnknownVersionError):
                await guarded(wrong, sound)(1)
        assert breakers.states() == {"slow": State.OPEN, "sound": State.CLOSED}

    asyncio.run(scenario())
