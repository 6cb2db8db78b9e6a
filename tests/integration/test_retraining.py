"""Retraining with real Ray, real stores and the CDNOW log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from configs.churn.cdnow import write_parquet
from configs.churn.definitions import purchases
from heliostat.clock import ManualClock, parse_instant_us
from heliostat.errors import RolloutError, TrainingDataError
from heliostat.retraining import Decision, decide, retrain, state_of
from heliostat.settings import Settings, TrainingSettings
from heliostat.workspace import Workspace

pytestmark = pytest.mark.usefixtures("ray_local")

FIRST_US = parse_instant_us("1998-01-01")
NOW_US = parse_instant_us("1998-07-01")


@pytest.fixture
def workspace(settings: Settings, tmp_path: Path) -> Iterator[Workspace]:
    """The log is ingested; nothing serves; it is January 1998."""
    write_parquet(tmp_path / "purchases.parquet")
    quick = TrainingSettings(
        instants=("1997-07-01",), validation_instants=("1997-10-01",), trials=1, rounds=40, concurrent_trials=1
    )
    with Workspace.open(settings.model_copy(update={"training": quick})) as opened:
        opened.clock = ManualClock(FIRST_US)
        opened.event_log.append(purchases, pq.read_table(tmp_path / "purchases.parquet"), ingested_us=NOW_US)
        yield opened


def _decide(workspace: Workspace) -> Decision:
    return decide(state_of(workspace, "churn"), workspace.settings.retraining, now_us=workspace.clock.now_us())


def _later(workspace: Workspace) -> None:
    """It is July 1998."""
    assert isinstance(workspace.clock, ManualClock)
    workspace.clock.set(NOW_US)


def _outcomes(workspace: Workspace) -> list[str | None]:
    with workspace.catalog.read() as rows:
        return [run.outcome for run in rows.runs("retrain")]


@pytest.mark.slow
def test_the_first_training_is_due_takes_the_settings_instants_and_serves(workspace: Workspace) -> None:
    decision = _decide(workspace)
    assert [reason.trigger for reason in decision.reasons] == ["nothing serves"]
    done = retrain(workspace, decision)
    assert (done.outcome, done.training.version, done.exit_code) == ("promoted", 1, 0)
    assert done.training.split.validation_us == (parse_instant_us("1997-10-01"),)
    route = workspace.rollout.current("churn")
    assert route is not None
    assert route.control.version == 1
    assert workspace.models.package("churn", 1).profile is not None, "drift can be measured against it"
    assert _outcomes(workspace) == ["promoted"]
    assert not _decide(workspace).due


def test_a_retraining_that_fails_is_kept_and_starts_the_cool_down(workspace: Workspace) -> None:
    assert isinstance(workspace.clock, ManualClock)
    workspace.clock.set(parse_instant_us("1997-03-01"))
    with pytest.raises(TrainingDataError):
        retrain(workspace, _decide(workspace))
    assert _outcomes(workspace) == ["failed"]
    assert _decide(workspace).held_until_us is not None


@pytest.mark.slow
def test_a_retraining_learns_from_newer_labels_and_is_tried_on_a_share(workspace: Workspace) -> None:
    retrain(workspace, _decide(workspace))
    _later(workspace)
    decision = _decide(workspace)
    assert decision.due
    done = retrain(workspace, decision, challenger_weight=0.2)
    assert done.outcome == "challenger"
    assert done.training.compared_with == 1
    assert done.training.split.validation_us == (parse_instant_us("1998-04-01"),)
    assert max(done.training.split.train_us) == parse_instant_us("1998-01-01")
    route = workspace.rollout.current("churn")
    assert route is not None
    assert [(variant.version, variant.weight) for variant in route.variants] == [(1, 0.8), (2, 0.2)]
    production = workspace.models.alias("churn")
    assert production is not None
    assert production.version == 1

    held = _decide(workspace)
    assert not held.due
    assert held.held_until_us is not None
    with pytest.raises(RolloutError, match="stop it first"):
        retrain(workspace, held)
    assert _outcomes(workspace) == ["challenger", "promoted"]
