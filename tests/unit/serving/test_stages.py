from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from heliostat.errors import (
    CatalogUnavailableError,
    SignatureMismatchError,
    UnknownAliasError,
    UnknownVersionError,
    UnknownViewError,
)
from heliostat.experiments.assignment import RoutingDocument
from heliostat.models.packaging import LoadedModel
from heliostat.serving.lookup import FeatureQuery
from heliostat.serving.routing import ABRouter, RouteQuery
from heliostat.serving.scoring import ModelRunner, ScoreQuery
from tests.unit.serving.collaborators import NAMES, House, Versions, split, trained

# ── Features ────────────────────────────────────────────────────────────────────────


def test_one_read_brings_the_features_of_all_entities_and_the_routing_document() -> None:
    house = House()
    block = asyncio.run(house.lookup(FeatureQuery("churn", NAMES, ("1", "404", "2"))))
    assert block.values.tolist()[0] == [2.0, 30.0, 15.0, 4.0]
    assert block.absent_views() == [(), ("usage@1",), ()]
    assert block.route == RoutingDocument.single("churn", 1, revision=1).to_bytes()
    assert house.store.reads == [4]  # a bundle for each of three entities, and the document


def test_features_of_an_undeclared_view_are_refused() -> None:
    house = House()
    with pytest.raises(UnknownViewError, match="usage@1"):
        asyncio.run(house.lookup(FeatureQuery("churn", ("nope__count",), ("1",))))


def test_without_the_store_an_aggregate_is_null_and_not_that_of_nobody() -> None:
    house = House()
    query = FeatureQuery("churn", NAMES, ("1", "2"), {1: {"count_30d": 3.0}})
    block = house.readers.blank(query, as_of_us=house.clock.now_us())
    assert np.isnan(block.values[0]).all()
    assert block.values[1, [0, 3]].tolist() == [3.0, 6.0]
    assert block.stored is False
    assert block.absent_views() == [(), ()]


def test_columns_are_given_by_name_in_any_order_and_never_invented() -> None:
    house = House()
    block = asyncio.run(house.lookup(FeatureQuery("churn", NAMES, ("1", "2", "3"))))
    turned = block.matrix(NAMES[::-1], rows=[2, 0])
    assert turned.tolist() == block.values[[2, 0]][:, ::-1].tolist()
    assert turned.flags["C_CONTIGUOUS"]
    with pytest.raises(SignatureMismatchError, match="usage__other"):
        block.matrix(("usage__other",))


# ── Variants ────────────────────────────────────────────────────────────────────────


def test_a_document_is_parsed_once_however_often_it_comes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    parse = RoutingDocument.from_bytes
    monkeypatch.setattr(RoutingDocument, "from_bytes", lambda content: parsed.append(content) or parse(content))

    async def scenario() -> None:
        router = ABRouter(lambda _: None)
        for document in (split(1), split(1), split(2), split(2), split(1)):
            assert (await router.route("churn", document.to_bytes())).revision == document.revision
        assert len(parsed) == 3

    asyncio.run(scenario())


def test_a_document_that_cant_be_read_leaves_the_last_one_in_force() -> None:
    async def scenario() -> None:
        router = ABRouter(lambda _: None)
        await router.route("churn", split(4).to_bytes())
        assert (await router.route("churn", b"{broken")).revision == 4

    asyncio.run(scenario())


def test_those_outside_of_the_experiment_are_told_apart_from_the_control() -> None:
    document = split(1, coverage=0.5)
    entities = tuple(str(each) for each in range(200))

    async def scenario() -> None:
        assignment = await ABRouter(lambda _: None)(RouteQuery("churn", document.to_bytes(), entities))
        for at, entity in enumerate(entities):
            variant = document.variant_of(entity)
            assert assignment.names[assignment.chosen[at]] == ("outside" if variant is None else variant.name)
            assert assignment.versions[assignment.chosen[at]] == (1 if variant is None else variant.version)
        assert {assignment.names[at] for at in assignment.chosen} == {"control", "challenger", "outside"}

    asyncio.run(scenario())


def test_nobody_waits_for_the_catalog_where_a_document_is_known_and_the_next_has_its_answer() -> None:
    asked = threading.Event()

    def load(_: str) -> RoutingDocument:
        asked.wait(5)
        return split(9)

    async def scenario() -> None:
        router = ABRouter(load)
        await router.route("churn", split(1).to_bytes())
        assert (await router.route("churn", None)).revision == 1
        asked.set()
        await router._asked["churn"][1]
        assert (await router.route("churn", None)).revision == 9

    asyncio.run(scenario())


def test_the_catalog_is_asked_once_by_all_who_find_no_document() -> None:
    calls: list[str] = []

    def load(model: str) -> RoutingDocument:
        calls.append(model)
        return split(2)

    async def scenario() -> None:
        router = ABRouter(load)
        routes = await asyncio.gather(*(router.route("churn", None) for _ in range(5)))
        assert {route.revision for route in routes} == {2}

    asyncio.run(scenario())
    assert calls == ["churn"]


def test_a_catalog_that_is_down_too_is_no_route() -> None:
    def load(_: str) -> RoutingDocument:
        raise CatalogUnavailableError("sqlite://", "locked")

    with pytest.raises(UnknownAliasError):
        asyncio.run(ABRouter(load).route("churn", None))


# ── Models ──────────────────────────────────────────────────────────────────────────


def query(version: int, rows: int = 2) -> ScoreQuery:
    return ScoreQuery("churn", version, np.full((rows, len(NAMES)), 4.0))


def test_a_version_is_loaded_once_by_all_who_ask_for_it() -> None:
    versions = Versions()

    async def scenario() -> None:
        runner = ModelRunner(versions.load)
        answers = await asyncio.gather(*(runner(query(1)) for _ in range(5)))
        expected = trained(1).load().predict(query(1).matrix)
        assert all((answer == expected).all() for answer in answers)

    asyncio.run(scenario())
    assert versions.loads == [1]


def test_a_load_goes_on_when_those_who_asked_have_left() -> None:
    started, go_on = threading.Event(), threading.Event()
    versions = Versions()

    def load(model: str, version: int) -> LoadedModel:
        started.set()
        go_on.wait(5)
        return versions.load(model, version)

    async def scenario() -> None:
        runner = ModelRunner(load)
        impatient = asyncio.create_task(runner(query(1)))
        await asyncio.to_thread(started.wait, 5)
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        go_on.set()
        assert len(await runner(query(1))) == 2

    asyncio.run(scenario())
    assert versions.loads == [1]


def test_a_load_that_failed_is_tried_again_by_the_next() -> None:
    versions = Versions()
    versions.broken = {1}

    async def scenario() -> None:
        runner = ModelRunner(versions.load)
        with pytest.raises(UnknownVersionError):
            await runner(query(1))
        versions.broken = set()
        assert len(await runner(query(1))) == 2

    asyncio.run(scenario())


def test_versions_that_were_used_last_are_kept_and_no_more() -> None:
    versions = Versions()
    sizes = {version: trained(version).memory_bytes for version in (1, 2, 3)}

    async def scenario() -> None:
        runner = ModelRunner(versions.load, capacity_bytes=sum(sizes.values()) - 1)
        for version in (1, 2, 1, 3, 1, 2):
            await runner(query(version))

    asyncio.run(scenario())
    assert versions.loads == [1, 2, 3, 2]


def test_many_rows_give_what_few_rows_give() -> None:
    async def scenario() -> None:
        runner = ModelRunner(Versions().load)
        many = await runner(query(1, rows=3_000))
        assert (many == (await runner(query(1)))[0]).all()
        assert many.shape == (3_000,)

    asyncio.run(scenario())
