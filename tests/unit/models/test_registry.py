from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliostat.clock import ManualClock
from heliostat.errors import (
    ArtifactCorruptError,
    GateFailedError,
    InvalidPackageError,
    InvalidValueError,
    PromotionConflictError,
    RollbackError,
    SignatureMismatchError,
    UnknownAliasError,
    UnknownModelError,
    UnknownVersionError,
)
from heliostat.features.aggregations import Count, Sum
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.models.definitions import Label, ModelSpec
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.models.registry import ModelRegistry
from heliostat.schema import TIMESTAMP
from heliostat.storage.artifact_store import ArtifactStore
from heliostat.storage.catalog import Catalog

customer = Entity("customer", keys={"customer_id": "int64"})
purchases = EventSource(
    "purchases",
    schema=pa.schema([("customer_id", pa.int64()), ("at", TIMESTAMP), ("id", pa.string()), ("amount", pa.float64())]),
    entity=customer,
    event_time="at",
    event_id="id",
)
behaviour = FeatureView(
    "behaviour",
    version=1,
    source=purchases,
    features={"n": Count(window="30d"), "spend": Sum("amount", window="30d")},
)
churn = ModelSpec("churn", customer, [behaviour], Label.none_within("churned", purchases, "90d"))

_numbers = itertools.count()

PASSED = {"passed": True, "checks": []}
FAILED = {
    "passed": False,
    "checks": [
        {"name": "minimum", "passed": False, "reason": "auc 0.51 is below 0.6"},
        {"name": "latency", "passed": True, "reason": "0.1 ms"},
    ],
}


@pytest.fixture(scope="module")
def package() -> ModelPackage:
    matrix = np.random.default_rng(3).normal(size=(200, 2))
    data = lgb.Dataset(matrix, (matrix[:, 0] > 0).astype(float), feature_name=list(churn.feature_names))
    booster = lgb.train({"objective": "binary", "verbosity": -1, "num_threads": 1}, data, 2)
    return ModelPackage(
        booster.model_to_string(), Signature.of(churn), "binary", profile={"format": 1}, metrics={"auc": 0.8}
    )


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1_000_000)


@pytest.fixture
def registry(tmp_path: Path, clock: ManualClock) -> Iterator[ModelRegistry]:
    with Catalog.open(f"sqlite:///{tmp_path}/catalog.db") as catalog:
        yield ModelRegistry(catalog, ArtifactStore(tmp_path / "artifacts"), clock)


@pytest.fixture
def three(registry: ModelRegistry, package: ModelPackage) -> ModelRegistry:
    """A registry with versions 1 to 3, all through the gate."""
    for seed in (1, 2, 3):
        version = registry.register(churn, replace(package, parameters={"seed": seed}), lineage={"log": seed})
        registry.record_gate("churn", version.version, PASSED)
    return registry


# ── Versions ────────────────────────────────────────────────────────────────────────


def test_a_registered_model_is_a_candidate_with_its_lineage(registry: ModelRegistry, package: ModelPackage) -> None:
    version = registry.register(churn, package, lineage={"event_log_version": 4})
    assert (version.model, version.version, version.status, version.aliases) == ("churn", 1, "candidate", ())
    assert version.created_us == 1_000_000
    assert version.metrics == {"auc": 0.8}
    assert version.lineage == {
        "event_log_version": 4,
        "model_hash": churn.content_hash,
        "label_hash": churn.label.content_hash,
        "view_hashes": {"behaviour@1": behaviour.content_hash},
    }
    assert registry.get("churn") == version


def test_versions_count_up_by_model(three: ModelRegistry, package: ModelPackage) -> None:
    other = replace(churn, name="leaving")
    assert three.register(other, package, lineage={}).version == 1
    assert [version.version for version in three.list("churn")] == [1, 2, 3]
    assert [(version.model, version.version) for version in three.list()][-1] == ("leaving", 1)
    assert three.models() == ("churn", "leaving")


def test_a_loaded_version_predicts_as_before(registry: ModelRegistry, package: ModelPackage) -> None:
    registry.register(churn, package, lineage={})
    matrix = np.array([[0.1, -0.2], [np.nan, 3.0]])
    np.testing.assert_array_equal(registry.load("churn").predict(matrix), package.load().predict(matrix))


def test_a_version_is_found_by_number_text_alias_and_latest(three: ModelRegistry) -> None:
    three.promote("churn", 2)
    assert [three.get("churn", selector).version for selector in (1, "1", "production", "latest")] == [1, 1, 2, 3]


def test_what_does_not_exist_is_told_with_what_does(three: ModelRegistry) -> None:
    with pytest.raises(UnknownModelError, match=r"'nothing'.*churn"):
        three.get("nothing")
    with pytest.raises(UnknownVersionError, match=r"version 9.*1, 2, 3"):
        three.get("churn", 9)
    with pytest.raises(UnknownAliasError, match="'production'"):
        three.get("churn", "production")
    with pytest.raises(UnknownModelError):
        three.list("nothing")


def test_features_that_are_not_the_declared_ones_are_refused(registry: ModelRegistry, package: ModelPackage) -> None:
    fewer = replace(churn, features=[behaviour["n"]])
    with pytest.raises(SignatureMismatchError, match="behaviour__spend"):
        registry.register(fewer, package, lineage={})
    assert registry.models() == ()


def test_another_objective_than_the_declared_one_is_refused(registry: ModelRegistry, package: ModelPackage) -> None:
    with pytest.raises(InvalidPackageError, match="regression"):
        registry.register(churn, replace(package, objective="regression"), lineage={})


def test_a_version_whose_files_were_changed_is_not_loaded(
    three: ModelRegistry, package: ModelPackage, tmp_path: Path
) -> None:
    (tmp_path / "artifacts" / three.get("churn", 2).artifact / "model.txt").write_text(package.booster_text + "\n")
    with pytest.raises(ArtifactCorruptError, match="roll back"):
        three.load("churn", 2)
    with pytest.raises(ArtifactCorruptError):
        three.promote("churn", 2)
    assert three.alias("churn") is None


def test_a_version_shows_as_json(three: ModelRegistry) -> None:
    three.promote("churn", 1)
    shown = three.get("churn", 1).to_document()
    assert shown["aliases"] == ["production"]
    assert shown["created"] == "1970-01-01T00:00:01Z"
    assert shown["features"] == ["behaviour__n", "behaviour__spend"]


# ── The gate ────────────────────────────────────────────────────────────────────────


def test_production_needs_a_gate_report(registry: ModelRegistry, package: ModelPackage) -> None:
    registry.register(churn, package, lineage={})
    with pytest.raises(GateFailedError, match="no gate report"):
        registry.promote("churn", 1)


def test_a_failed_gate_says_why(three: ModelRegistry) -> None:
    with pytest.raises(GateFailedError, match=r"auc 0\.51 is below 0\.6") as told:
        three.promote("churn", 1, gate=FAILED)
    assert told.value.reasons == ("auc 0.51 is below 0.6",)
    assert three.alias("churn") is None


def test_the_newest_recorded_report_counts(three: ModelRegistry) -> None:
    three.record_gate("churn", 1, FAILED)
    with pytest.raises(GateFailedError):
        three.promote("churn", 1)
    three.record_gate("churn", 1, PASSED)
    assert three.promote("churn", 1).evidence == {"gate": PASSED}


@pytest.mark.parametrize("report", [{}, {"passed": "yes"}, {"passed": False, "checks": []}])
def test_a_report_that_does_not_say_passed_is_a_no(three: ModelRegistry, report: dict[str, object]) -> None:
    with pytest.raises(GateFailedError):
        three.promote("churn", 1, gate=report)


def test_a_gate_may_be_overruled_with_a_reason_that_is_kept(three: ModelRegistry) -> None:
    with pytest.raises(InvalidValueError, match="why"):
        three.promote("churn", 1, gate=FAILED, force=True)
    moved = three.promote("churn", 1, gate=FAILED, force=True, reason="production is on fire")
    assert (moved.action, moved.reason, moved.evidence["gate"]) == ("force", "production is on fire", FAILED)


def test_other_aliases_need_no_gate(registry: ModelRegistry, package: ModelPackage) -> None:
    registry.register(churn, package, lineage={})
    assert registry.promote("churn", 1, alias="shadow").version == 1
    assert registry.get("churn", 1).aliases == ("shadow",)


def test_a_report_on_a_version_that_does_not_exist_is_refused(three: ModelRegistry) -> None:
    with pytest.raises(UnknownVersionError):
        three.record_gate("churn", 9, PASSED)


# ── Moving aliases ──────────────────────────────────────────────────────────────────


def test_status_is_read_off_the_aliases(three: ModelRegistry) -> None:
    three.promote("churn", 1)
    three.promote("churn", 2)
    assert [version.status for version in three.list("churn")] == ["retired", "live", "candidate"]


def test_a_promotion_at_a_revision_that_has_passed_is_refused(three: ModelRegistry) -> None:
    three.promote("churn", 1, expected_revision=0)
    with pytest.raises(PromotionConflictError, match=r"revision 0.*revision 1 \(version 1\)"):
        three.promote("churn", 2, expected_revision=0)
    assert three.promote("churn", 2, expected_revision=1).revision == 2


def test_repeating_a_promotion_does_no_harm(three: ModelRegistry) -> None:
    first = three.promote("churn", 1)
    assert three.promote("churn", 1) == first
    assert len(three.history("churn")) == 1


@pytest.mark.parametrize("alias", ["latest", "7", "", "with space"])
def test_an_alias_that_could_be_taken_for_something_else_is_refused(three: ModelRegistry, alias: str) -> None:
    with pytest.raises(InvalidValueError, match="alias"):
        three.promote("churn", 1, alias=alias)


def test_history_keeps_every_move_with_its_evidence(three: ModelRegistry, clock: ManualClock) -> None:
    three.promote("churn", 1, reason="first", evidence={"experiment": "none"})
    clock.advance(5)
    three.promote("churn", 3, reason="better")
    clock.advance(5)
    three.rollback("churn", reason="worse after all", evidence={"alarm": "drift"})
    moves = [(row.version, row.previous, row.action, row.reason, row.at_us) for row in three.history("churn")]
    assert moves == [
        (1, None, "promote", "first", 1_000_000),
        (3, 1, "promote", "better", 1_000_005),
        (1, 3, "rollback", "worse after all", 1_000_010),
    ]
    assert three.history("churn")[0].evidence == {"gate": PASSED, "experiment": "none"}
    assert three.history("churn", "production")[2].evidence == {"alarm": "drift"}


def test_rolling_back_twice_goes_back_twice(three: ModelRegistry) -> None:
    for version in (1, 2, 3):
        three.promote("churn", version)
    assert three.rollback("churn", reason="worse").version == 2
    assert three.rollback("churn", reason="still worse").version == 1
    with pytest.raises(RollbackError, match="before version 1"):
        three.rollback("churn", reason="even so")


def test_there_is_no_way_back_from_the_first_version(three: ModelRegistry) -> None:
    with pytest.raises(UnknownAliasError):
        three.rollback("churn", reason="nothing there")
    three.promote("churn", 1)
    with pytest.raises(RollbackError):
        three.rollback("churn", reason="nothing before")


def test_a_rollback_at_a_revision_that_has_passed_is_refused(three: ModelRegistry) -> None:
    for version in (1, 2, 3):
        three.promote("churn", version)
    with pytest.raises(PromotionConflictError):
        three.rollback("churn", reason="worse", expected_revision=2)
    assert three.get("churn", "production").version == 3


@given(moves=st.lists(st.sampled_from([1, 2, 3, "back"]), max_size=12))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_promotions_and_rollbacks_are_a_stack(three: ModelRegistry, moves: list[int | str]) -> None:
    alias = f"alias_{next(_numbers)}"  # the fixture is the same for all examples
    stack: list[int] = []
    for move in moves:
        if move == "back":
            if len(stack) < 2:
                with pytest.raises((RollbackError, UnknownAliasError)):
                    three.rollback("churn", alias, reason="back")
                continue
            stack.pop()
            assert three.rollback("churn", alias, reason="back").version == stack[-1]
        else:
            assert three.promote("churn", int(move), alias=alias).version == move
            if not stack or stack[-1] != move:
                stack.append(int(move))
    found = three.alias("churn", alias)
    assert (found.version if found else None) == (stack[-1] if stack else None)
    revisions = [row.revision for row in three.history("churn", alias)]
    assert revisions == list(range(1, len(revisions) + 1))
