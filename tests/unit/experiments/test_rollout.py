from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from heliostat.clock import ManualClock
from heliostat.errors import ConflictError, InvalidRouteError, RolloutError, UnknownModelError, UnknownVersionError
from heliostat.experiments.assignment import RoutingDocument
from heliostat.experiments.rollout import Rollout
from heliostat.storage.catalog import Catalog
from heliostat.storage.catalog_tables import RouteRow, VersionRow


class Board:
    """Where requests read routes."""

    def __init__(self) -> None:
        self.documents: dict[str, bytes] = {}

    def publish(self, model: str, document: bytes) -> None:
        self.documents[model] = document

    def route(self, model: str = "churn") -> RoutingDocument:
        return RoutingDocument.from_bytes(self.documents[model])


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.open(f"sqlite:///{tmp_path}/catalog.db") as opened:
        with opened.write() as rows:
            for version in (1, 2, 3):
                rows.add_version(VersionRow("churn", version, "digest", {}, {}, {}, None, {}, 0))
        yield opened


@pytest.fixture
def rollout(catalog: Catalog, board: Board) -> Rollout:
    return Rollout(catalog, ManualClock(7), board.publish)


def _start(rollout: Rollout, **changed: Any) -> RoutingDocument:
    arguments: dict[str, Any] = {"experiment": "spring", "control": 1, "challenger": 2, "weight": 0.2, **changed}
    return rollout.start_split("churn", **arguments)


# ── The way through ─────────────────────────────────────────────────────────────────


def test_a_first_version_serves_everybody(rollout: Rollout, board: Board) -> None:
    route = rollout.serve("churn", 1, reason="first", shadow=(2,))
    assert (route.revision, route.versions, route.is_split) == (1, (1, 2), False)
    assert board.route() == route == rollout.current("churn")


def test_a_split_serves_two(rollout: Rollout, board: Board) -> None:
    rollout.serve("churn", 1, reason="first")
    route = _start(rollout, coverage=0.5)
    assert [(each.name, each.version, each.weight) for each in route.variants] == [
        ("control", 1, 0.8),
        ("challenger", 2, 0.2),
    ]
    assert (route.revision, route.coverage, route.salt) == (2, 0.5, "churn/spring")
    assert board.route() == route


def test_a_split_widens_and_moves_nobody(rollout: Rollout, board: Board) -> None:
    entities = [str(number) for number in range(1_000)]
    before = _start(rollout, coverage=0.3)
    after = rollout.widen("churn", 0.9)
    assert board.route() == after
    inside = before.assign(entities) >= 0
    assert (before.assign(entities)[inside] == after.assign(entities)[inside]).all()
    assert (after.assign(entities) >= 0).sum() > inside.sum()


def test_the_control_is_kept(rollout: Rollout, board: Board) -> None:
    _start(rollout)
    assert rollout.stop("churn", reason="no difference").control.version == 1
    assert not board.route().is_split


def test_the_challenger_is_promoted_before_it_serves_everybody(rollout: Rollout, board: Board) -> None:
    promoted: list[tuple[int, Mapping[str, Any], bool]] = []
    _start(rollout)

    def promote(version: int, evidence: Mapping[str, Any]) -> None:
        promoted.append((version, evidence, board.route().is_split))

    rollout.stop("churn", keep="challenger", reason="better", evidence={"lift": 0.1}, promote=promote)
    ((version, evidence, still_split),) = promoted
    assert (version, evidence["lift"], evidence["experiment"]["salt"], still_split) == (2, 0.1, "churn/spring", True)
    assert board.route().control.version == 2


def test_history_keeps_every_route_and_why(rollout: Rollout) -> None:
    rollout.serve("churn", 1, reason="first")
    _start(rollout)
    rollout.widen("churn", 1.0)
    rollout.stop("churn", reason="no difference")
    assert [(row.revision, row.reason, row.at_us) for row in rollout.history("churn")] == [
        (1, "first", 7),
        (2, "experiment spring", 7),
        (3, "coverage 1", 7),
        (4, "no difference", 7),
    ]


# ── Steps that don't follow ─────────────────────────────────────────────────────────


def test_a_second_split_waits_for_the_first(rollout: Rollout) -> None:
    _start(rollout)
    with pytest.raises(RolloutError, match="control version 1 at 0.8.*stop it first"):
        _start(rollout, experiment="summer", challenger=3)


def test_a_promotion_does_not_end_a_split_unasked(rollout: Rollout) -> None:
    _start(rollout)
    with pytest.raises(RolloutError, match="stop the split first"):
        rollout.serve("churn", 3, reason="new")
    assert not rollout.serve("churn", 3, reason="rollback", end_split=True).is_split


def test_the_control_is_what_serves(rollout: Rollout) -> None:
    rollout.serve("churn", 3, reason="first")
    with pytest.raises(RolloutError, match="version 3 serves, not 1"):
        _start(rollout)


def test_a_name_is_used_once(rollout: Rollout) -> None:
    _start(rollout)
    rollout.stop("churn", reason="no difference")
    with pytest.raises(RolloutError, match="the same entities again"):
        _start(rollout, challenger=3)


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_split_has_two_arms(rollout: Rollout, weight: float) -> None:
    with pytest.raises(RolloutError, match="above 0 and below 1"):
        _start(rollout, weight=weight)


def test_a_version_is_not_tried_against_itself(rollout: Rollout) -> None:
    with pytest.raises(RolloutError, match="both arms"):
        _start(rollout, challenger=1)


def test_coverage_never_shrinks_and_stays_a_share(rollout: Rollout) -> None:
    _start(rollout, coverage=0.5)
    with pytest.raises(RolloutError, match="covers 0.5 already"):
        rollout.widen("churn", 0.4)
    with pytest.raises(InvalidRouteError, match="coverage is 1.2"):
        rollout.widen("churn", 1.2)


def test_without_a_split_there_is_nothing_to_widen_or_stop(rollout: Rollout) -> None:
    with pytest.raises(RolloutError, match="no route yet"):
        rollout.stop("churn", reason="x")
    rollout.serve("churn", 1, reason="first")
    with pytest.raises(RolloutError, match="version 1 serves everybody"):
        rollout.widen("churn", 0.5)


def test_versions_that_do_not_exist_are_refused(rollout: Rollout) -> None:
    with pytest.raises(UnknownVersionError, match="1, 2, 3"):
        rollout.serve("churn", 9, reason="x")
    with pytest.raises(UnknownVersionError):
        rollout.serve("churn", 1, reason="x", shadow=(9,))
    with pytest.raises(UnknownModelError, match="churn"):
        rollout.serve("nothing", 1, reason="x")
    assert rollout.history("churn") == ()


def test_a_challenger_is_not_kept_without_promoting_it(rollout: Rollout) -> None:
    _start(rollout)
    with pytest.raises(RolloutError, match="promote"):
        rollout.stop("churn", keep="challenger", reason="better")


# ── Races and crashes ───────────────────────────────────────────────────────────────


def test_a_step_at_a_revision_that_has_passed_is_refused(rollout: Rollout) -> None:
    rollout.serve("churn", 1, reason="first", expected_revision=0)
    with pytest.raises(RolloutError, match="revision 1, not 0"):
        rollout.serve("churn", 2, reason="second", expected_revision=0)
    _start(rollout, expected_revision=1)
    promoted: list[int] = []
    with pytest.raises(RolloutError, match="revision 2, not 1"):
        rollout.stop(
            "churn", keep="challenger", reason="x", expected_revision=1, promote=lambda v, _: promoted.append(v)
        )
    assert promoted == []


def test_a_promotion_that_fails_leaves_the_split_running(rollout: Rollout, board: Board) -> None:
    split = _start(rollout)

    def refuse(_: int, __: Mapping[str, Any]) -> None:
        raise ConflictError("the gate says no")

    with pytest.raises(ConflictError):
        rollout.stop("churn", keep="challenger", reason="better", promote=refuse)
    assert board.route() == split == rollout.current("churn")


def test_a_crash_between_promotion_and_route_is_completed_by_stopping_again(catalog: Catalog, board: Board) -> None:
    def crash(_: str, __: bytes) -> None:
        raise ConnectionError("the online store has gone")

    _start(Rollout(catalog, ManualClock(), board.publish))
    with pytest.raises(ConnectionError):
        Rollout(catalog, ManualClock(), crash).stop("churn", reason="no difference")
    assert board.route().is_split
    healed = Rollout(catalog, ManualClock(), board.publish).publish("churn")
    assert board.route() == healed
    assert not healed.is_split


def test_of_two_publishers_the_later_revision_stays(catalog: Catalog, board: Board) -> None:
    other = Rollout(catalog, ManualClock(), board.publish)

    def slowly(model: str, document: bytes) -> None:
        if RoutingDocument.from_bytes(document).revision == 1:  # the other is faster, both in catalog and store
            other.serve("churn", 2, reason="second")
        board.publish(model, document)

    Rollout(catalog, ManualClock(), slowly).serve("churn", 1, reason="first")
    assert board.route().revision == 2
    assert board.route().control.version == 2


def test_a_lost_online_store_is_published_to_again(rollout: Rollout, board: Board) -> None:
    route = _start(rollout)
    board.documents.clear()
    assert rollout.publish("churn") == route == board.route()


def test_there_is_nothing_to_publish_before_the_first_route(rollout: Rollout) -> None:
    assert rollout.current("churn") is None
    with pytest.raises(RolloutError, match="promote a version first"):
        rollout.publish("churn")


def test_a_route_that_cannot_be_read_is_told(rollout: Rollout, catalog: Catalog) -> None:
    with catalog.write() as rows:
        rows.add_route(RouteRow("churn", 1, {"model": "churn"}, "by hand", 0))
    with pytest.raises(InvalidRouteError, match="'churn'"):
        rollout.current("churn")
