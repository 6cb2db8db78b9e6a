from __future__ import annotations

import asyncio

import pytest

from heliostat.errors import CatalogUnavailableError
from heliostat.serving.breaker import BreakerRule, Breakers, State
from heliostat.serving.standby import Standby, Standing, _undone


class Catalog:
    def __init__(self) -> None:
        self.standing = Standing(serving=(1,), coming=(2,))
        self.down = False
        self.asked = 0
        self.prepared: list[int] = []
        self.broken: set[int] = set()

    def look(self, _: str) -> Standing:
        self.asked += 1
        if self.down:
            raise CatalogUnavailableError("sqlite://", "locked")
        return self.standing

    async def prepare(self, _: str, version: int) -> None:
        self.prepared.append(version)
        if version in self.broken:
            raise RuntimeError("broken")


def standby(catalog: Catalog, breakers: Breakers) -> Standby:
    return Standby(["churn"], catalog.look, catalog.prepare, breaker=breakers.of("catalog"), every_s=0.01)


def test_what_may_serve_next_is_made_ready_once_and_what_serves_last_of_all() -> None:
    catalog = Catalog()

    async def scenario() -> None:
        ready = standby(catalog, Breakers())
        await ready.refresh()
        await ready.refresh()
        assert catalog.prepared == [2, 1]
        catalog.broken = {4}
        catalog.standing = Standing(serving=(2,), earlier=(1,), coming=(4, 3))
        await ready.refresh()
        assert catalog.prepared == [2, 1, 4, 3, 1, 2], "one that is broken stops nobody"
        assert ready.last_good("churn") == (2, 1)
        assert ready.last_good("other") == ()

    asyncio.run(scenario())


def test_while_the_catalog_is_away_what_was_known_holds_and_it_is_left_alone() -> None:
    catalog = Catalog()

    async def scenario() -> None:
        breakers = Breakers(BreakerRule(2, 60.0, 60.0))
        ready = standby(catalog, breakers)
        await ready.refresh()
        catalog.down = True
        for _ in range(6):
            await ready.refresh()
        assert (ready.last_good("churn"), catalog.asked) == ((1,), 3)
        assert breakers.states() == {"catalog": State.OPEN}

    asyncio.run(scenario())


def test_it_looks_again_and_again_until_it_is_closed() -> None:
    catalog = Catalog()

    async def scenario() -> None:
        ready = standby(catalog, Breakers())
        ready.start()
        ready.start()
        async with asyncio.timeout(5):
            while catalog.asked < 3:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.005)
        await ready.close()
        asked = catalog.asked
        await asyncio.sleep(0.05)
        assert catalog.asked == asked

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("controls", "found"),
    [
        ([], ()),
        ([1], ()),
        ([1, 2], (1,)),
        ([1, 2, 1], ()),
        ([1, 2, 3, 2], (1,)),
        ([1, 2, 2, 3], (2, 1)),
    ],
)
def test_a_version_that_was_undone_was_no_good_one(controls: list[int], found: tuple[int, ...]) -> None:
    assert _undone(controls) == found
