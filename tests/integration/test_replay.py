"""`heliostat replay-prediction`: rows of the log are made once more, on the CDNOW purchases."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from configs.churn.definitions import churn, purchases
from deployments.application import build_app
from deployments.stages import gateway_parts
from heliostat.batch import output_schema
from heliostat.clock import US_PER_DAY
from heliostat.errors import UnknownPredictionError
from heliostat.ingestion.sink import Sink
from heliostat.models.profile import Profile
from heliostat.monitoring.parity import Match
from heliostat.replay import replay
from heliostat.serving.answers import PredictAnswer, Predictions
from heliostat.serving.prediction_log import log_record
from heliostat.serving.telemetry import Meter
from heliostat.settings import ClockSettings, OnlineSettings, ServingSettings, Settings
from heliostat.workspace import Workspace
from tests.integration.cdnow_shop import JULY_US, fill
from tests.integration.test_serving import Client


@pytest.fixture(scope="module")
def workspace(session_home: Path, valkey: str) -> Iterator[Workspace]:
    settings = Settings(
        project="replay",
        home=session_home / "replay",
        online=OnlineSettings(url=valkey, timeout_s=10.0),
        clock=ClockSettings(kind="replay", replay_from="1998-07-01", speed=0.0),
        serving=ServingSettings(deadline_ms=20_000.0),
    )
    with Workspace.open(settings) as opened:
        fill(opened, 400)
        yield opened


def predicted(workspace: Workspace, **request: Any) -> list[dict[str, Any]]:
    """What a gateway answers, entity by entity."""

    async def main() -> list[dict[str, Any]]:
        parts = gateway_parts(Workspace.open(workspace.settings), Meter())
        transport = httpx.ASGITransport(build_app(parts), raise_app_exceptions=False)
        async with Client(transport=transport, base_url="http://gateway") as client:
            reply = await client.post("/predict", json=request)
        await parts.close()
        assert reply.status_code == 200, reply.text
        return list(reply.json()["entities"])

    return asyncio.run(main())


def logged(workspace: Workspace, name: str, score: float, *, fallback: str | None, vector: list[float]) -> str:
    """A row in the stream that nobody served."""
    rows = Predictions([score], [1], [fallback], np.array([vector], np.float64), [()], ["control"], [()])
    record = log_record([PredictAnswer(name, "churn", 1, 1, (7,), rows)], rows, ["7"], at_us=JULY_US)
    workspace.streams.append("predictions", [record])
    return f"{name}-0"


def heliostat(workspace: Workspace, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line on the same home and store."""
    environ = {**os.environ, **workspace.settings.environment()}
    command = [sys.executable, "-m", "heliostat.cli", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environ, timeout=120)


def test_a_prediction_is_replayed_from_the_stream_and_from_the_table_and_its_vector_is_that_of_training(
    workspace: Workspace,
) -> None:
    answers = predicted(workspace, entity_ids=[1, 2, 3, 404_404])
    for where in ("stream", "table"):
        for answer in answers:
            found = replay(workspace, answer["prediction_id"])
            assert (found.same, found.where, found.how) == (True, where, "what the version says of the stored vector")
            assert found.replayed == found.offline_score == found.score == answer["prediction"]
            assert (found.differing, found.not_compared) == ((), "")
            assert tuple(each.name for each in found.features) == churn.feature_names
            assert "same, bit for bit" in "\n".join(found.lines())
        Sink.of(workspace).drain_once()


def test_the_command_line_says_whether_it_is_the_same_by_its_exit_code(workspace: Workspace) -> None:
    (answer,) = predicted(workspace, entity_ids=[5])
    done = heliostat(workspace, "replay-prediction", answer["prediction_id"], "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["same"], told["offline_same"], told["entity"], told["version"]) == (True, True, "5", 1)
    assert told["replayed"] == told["score"] == answer["prediction"]
    vector = [each["served"] for each in told["features"]]
    other = logged(workspace, "a" * 32, np.nextafter(answer["prediction"], 1), fallback=None, vector=vector)
    done = heliostat(workspace, "replay-prediction", other)
    assert done.returncode == 1, done.stderr
    assert "NOT the same" in done.stdout


def test_what_the_request_gave_is_left_out_of_the_comparison(workspace: Workspace) -> None:
    (answer,) = predicted(workspace, entity_ids=[4], features=[{"recent_purchases__count_30d": 77}])
    found = replay(workspace, answer["prediction_id"])
    given = {each.name for each in found.features if each.match is None}
    assert "recent_purchases__count_30d" in given
    assert (found.same, found.differing) == (True, ())
    assert f"{len(given)} given by the request" in "\n".join(found.lines())
    assert {each["match"] for each in found.to_document()["features"] if each["name"] in given} == {
        "given by the request"
    }


def test_a_feature_that_the_log_has_otherwise_is_named_with_both_values_and_why(workspace: Workspace) -> None:
    (answer,) = predicted(workspace, entity_ids=[6])
    event = {"event_id": 99_000_001, "customer_id": 6, "purchased_at": JULY_US - US_PER_DAY, "quantity": 1}
    table = pa.Table.from_pylist([{**event, "amount": 5.0}], schema=purchases.schema)
    workspace.event_log.append(purchases, table, ingested_us=JULY_US + 1)  # known only afterwards
    found = replay(workspace, answer["prediction_id"])
    assert found.same, "the score is that of the stored vector all the same"
    differing = {each.name: each for each in found.differing}
    count = differing["recent_purchases__count_30d"]
    assert (count.match, count.offline - count.served) == (Match.LATE, 1.0)
    assert f"recent_purchases__count_30d: served {count.served}, offline {count.offline} (late)" in str(found.lines())


def test_a_fallback_that_asked_no_model_is_replayed_as_what_it_was(workspace: Workspace) -> None:
    nulls = [float("nan")] * len(churn.feature_names)
    profile = workspace.models.package("churn", 1).profile
    assert profile is not None
    prior = Profile.from_document(profile).prediction
    assert prior is not None
    found = replay(workspace, logged(workspace, "b" * 32, prior.mean, fallback="prior", vector=nulls))
    assert found.same
    assert "mean prediction in training" in found.how
    assert found.not_compared == "prior answered in place of the normal way"
    other = replay(workspace, logged(workspace, "c" * 32, 0.123, fallback="prior", vector=nulls))
    assert (other.same, other.replayed) == (False, prior.mean)

    row = {"customer_id": 7, "as_of": JULY_US - US_PER_DAY, "model_version": 1, "score": 0.625}
    batch = pa.Table.from_pylist([row], schema=output_schema(churn))
    none = replay(workspace, logged(workspace, "d" * 32, 0.625, fallback="batch_prediction", vector=nulls))
    assert (none.same, none.replayed) == (False, None)
    workspace.offline_store.write_batch("churn", JULY_US - US_PER_DAY, batch)
    found = replay(workspace, "d" * 32 + "-0")
    assert (found.same, found.replayed) == (True, 0.625)
    assert "the batch prediction of 1998-06-30" in found.how


def test_a_prediction_that_nobody_made_is_refused(workspace: Workspace) -> None:
    with pytest.raises(UnknownPredictionError, match="no prediction 'nonsense'"):
        replay(workspace, "nonsense")
    with pytest.raises(UnknownPredictionError, match="spend"):
        replay(workspace, "e" * 32 + "-0", model="spend")
