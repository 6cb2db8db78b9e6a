"""From a spine with the request's inputs to a model that asks requests for them, with Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import lightgbm as lgb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray.data

from deployments.application import build_app
from deployments.stages import gateway_parts
from heliostat.batch import scorer_of
from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import MissingInputError, SpineError
from heliostat.features.offline import compute_features
from heliostat.features.point_in_time import historical_features, snapshot
from heliostat.ingestion.intake import Intake
from heliostat.ingestion.sink import Sink
from heliostat.models.categories import Categories
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.models.registry import ModelVersion
from heliostat.models.spine import ModelSpine
from heliostat.online.retrieval import FeatureReader
from heliostat.schema import TIMESTAMP, text_code
from heliostat.serving.telemetry import Meter
from heliostat.settings import ClockSettings, Settings, StorageSettings, TrainingSettings
from heliostat.training.dataset import build_training_set, split_spine
from heliostat.training.fitting import Recipe
from heliostat.training.trainer import train
from heliostat.workspace import Workspace
from tests.integration.fraud_declarations import account, card, fraud, holders, payments, spending

START_US = parse_instant_us("1998-01-01")
NOW_US = parse_instant_us("1998-07-01")  # the settings' clock starts here
COUNTRIES = ["NL", "DE", "FR"]


def made_payments(n: int = 1_500) -> pa.Table:
    rng = np.random.default_rng(2)
    times = pa.array(START_US + rng.integers(0, 170 * US_PER_DAY, n)).cast(TIMESTAMP)
    countries = [[*COUNTRIES, None][each] for each in rng.integers(0, 4, n)]
    columns = [np.arange(n), rng.integers(0, 60, n), times, rng.gamma(2, 15, n), countries]
    return pa.table(columns, schema=payments.schema)


def made_profiles() -> pa.Table:
    rng = np.random.default_rng(3)
    rows = [(each, START_US + int(days) * US_PER_DAY) for each in range(50) for days in rng.choice(170, 3, False)]
    columns = [
        [each for each, _ in rows],
        pa.array([at for _, at in rows]).cast(TIMESTAMP),
        [[*COUNTRIES, None][each] for each in rng.integers(0, 4, len(rows))],
    ]
    return holders.identified(pa.table(columns, schema=holders.given_schema))


def made_spine(n: int = 400) -> pa.Table:
    rng = np.random.default_rng(4)
    times = START_US + rng.integers(35 * US_PER_DAY, 160 * US_PER_DAY, n)
    amounts = pa.array(rng.gamma(2, 20, n), mask=rng.random(n) < 0.05)
    return pa.table({"card": rng.integers(0, 70, n), "as_of": pa.array(times).cast(TIMESTAMP), "amount": amounts})


def expected(spine: pa.Table) -> dict[str, np.ndarray]:
    keys, as_of_us = card.encode(spine), spine["as_of"].cast(pa.int64()).to_numpy()
    request = {"amount": spine["amount"].to_numpy()}
    return {
        **compute_features([spending], made_payments(), keys, as_of_us, request=request),
        **compute_features([account], made_profiles(), keys, as_of_us),
    }


@pytest.fixture
def workspace(settings: Settings) -> Iterator[Workspace]:
    chosen = settings.model_copy(
        update={
            "definitions": "tests.integration.fraud_declarations",
            "storage": StorageSettings(buckets=4),
            "training": TrainingSettings(trials=0, rounds=40),
            "clock": ClockSettings(kind="replay", replay_from="1998-07-01"),
        }
    )
    with Workspace.open(chosen) as opened:
        for source, events in ((payments, made_payments()), (holders, made_profiles())):
            opened.event_log.append(source, events, ingested_us=NOW_US)
        yield opened


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("kind", ["arrow", "pandas", pytest.param("dataset", marks=pytest.mark.slow)])
def test_a_spines_column_is_what_a_request_brings(workspace: Workspace, kind: str) -> None:
    spine = made_spine()
    given: Any = spine
    if kind == "pandas":
        given = spine.to_pandas()
    if kind == "dataset":
        given = ray.data.from_arrow(spine)
    found = historical_features(given, [spending, account], workspace.event_log)
    if kind == "dataset":
        found = pd.concat(list(found.iter_batches(batch_format="pandas"))).sort_values("spine_row")
    for name, values in expected(spine).items():
        np.testing.assert_array_equal(np.asarray(found[name].to_numpy(), dtype=float), values, err_msg=name)
    codes = {text_code(each) for each in COUNTRIES}
    homes = expected(spine)["account__home"]
    assert set(homes[np.isfinite(homes)]) == codes


@pytest.mark.usefixtures("ray_local")
def test_a_join_without_the_column_says_so_before_it_begins(workspace: Workspace) -> None:
    with pytest.raises(SpineError, match="no column 'amount'; add it as float64"):
        historical_features(made_spine().drop_columns(["amount"]), [spending], workspace.event_log)
    frame = made_spine().to_pandas().assign(amount="a lot")
    with pytest.raises(SpineError, match="'amount' that is"):
        historical_features(frame, [spending], workspace.event_log)
    plain = historical_features(made_spine().drop_columns(["amount"]), [spending["n_30d"]], workspace.event_log)
    assert "spending__n_30d" in plain.column_names


@pytest.mark.usefixtures("ray_local")
def test_a_snapshot_leaves_out_what_only_a_request_knows(workspace: Workspace) -> None:
    found = snapshot(spending, workspace.event_log, as_of_us=NOW_US)
    assert [name for name in found.column_names if name.startswith("spending__")] == [
        f"spending__{name}" for name in spending.stored_features
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_model_learns_from_a_spine_and_asks_requests_for_its_inputs(workspace: Workspace) -> None:
    with pytest.raises(MissingInputError, match=r"'amount'.*give a spine"):
        train(workspace, fraud, instants_us=[NOW_US - 60 * US_PER_DAY], validation_us=[NOW_US - 20 * US_PER_DAY])
    spine = made_spine()
    report = train(workspace, fraud, spine=spine)
    assert report.split.of_spine
    assert report.rows[0] + report.rows[1] < 400
    version: ModelVersion = workspace.models.get("fraud", report.version)
    assert version.signature.inputs == (("amount", "float64"),)
    assert version.signature.categorical == ("spending__country", "account__home")
    assert version.lineage["spine"]
    package = workspace.models.package("fraud", report.version)
    assert set(package.categories.codes["account__home"]) <= {int(text_code(each)) for each in COUNTRIES}

    # What is served for the same rows is what batch prediction gives, and what training would see.
    with pytest.raises(MissingInputError, match="'amount'"):
        scorer_of(workspace, fraud, version=report.version)
    asked = pa.table({"card": pa.array(range(40)), "amount": pa.array([float(each) for each in range(40)])})
    scorer = scorer_of(workspace, fraud, version=report.version, inputs=asked)
    rows = pa.concat_tables([scorer.score(bucket) for bucket in range(4)]).sort_by("card")
    found = expected(asked.append_column("as_of", rows["as_of"]))
    matrix = np.column_stack([found[name] for name in fraud.feature_names])
    np.testing.assert_allclose(rows["score"].to_numpy(), package.load().predict(matrix), rtol=1e-12)


def test_the_rings_serve_what_the_spine_trains_on(workspace: Workspace) -> None:
    views = [spending, account]
    settings = workspace.settings
    intake = Intake(
        workspace.online,
        [payments, holders],
        views,
        clock=workspace.clock,
        settings=settings.ingestion,
        n_buckets=settings.storage.buckets,
        categories=workspace.categories,
    )
    in_order = made_payments().sort_by("at").slice(1_000)
    for batch in in_order.to_batches(max_chunksize=500):
        intake.submit("payments", batch.to_pylist())
    intake.submit("holders", made_profiles().drop_columns(["row_id"]).to_pylist())
    cards, amounts = [str(each) for each in range(60)], np.arange(60) * 1.5
    reader = FeatureReader.open([*spending, *account], settings)
    batch, _ = reader.read(workspace.online, cards, as_of_us=NOW_US, inputs={"amount": amounts})
    keys, instants = card.encoded(cards), np.full(60, NOW_US)
    offline = {
        **compute_features([spending], in_order, keys, instants, request={"amount": amounts}),
        **compute_features([account], made_profiles(), keys, instants),
    }
    wanted = np.column_stack([offline[name] for name in batch.names])
    np.testing.assert_allclose(batch.matrix, wanted, rtol=1e-12)


# ── Over HTTP, without Ray ──────────────────────────────────────────────────────────


def _promoted(workspace: Workspace) -> ModelPackage:
    """A version that serves, trained on the spine in this process."""
    spine = ModelSpine.of(made_spine(), fraud, workspace.event_log.n_buckets)
    split = split_spine(spine, horizon_us=fraud.label.horizon_us, now_us=NOW_US)
    training_set = build_training_set(
        fraud,
        workspace.event_log,
        split,
        spine=spine,
        rows_of=lambda rows: pa.concat_tables([rows.table(bucket) for bucket in rows.event_log.buckets]),
    )
    training, recipe = training_set.training, Recipe.of(fraud, seed=1)
    categories = Categories.learned(training.matrix, fraud.feature_names, fraud.categorical)
    rows = recipe.dataset(
        categories.encoded(training.matrix, fraud.feature_names), training.labels, recipe.parameters
    )
    text = lgb.train({**recipe.parameters, "num_threads": 1}, rows, num_boost_round=20).model_to_string()
    package = ModelPackage(text, Signature.of(fraud), "binary", categories=categories)
    version = workspace.models.register(fraud, package, lineage=training_set.origin()).version
    workspace.promote("fraud", version, reason="a test", gate={"passed": True})
    return package


def test_what_is_served_over_http_is_what_the_log_gives_again(workspace: Workspace) -> None:
    package, rng = _promoted(workspace), np.random.default_rng(9)
    now_us = workspace.clock.now_us()
    events = [
        {
            "id": 10_000 + each,
            "card": int(rng.integers(0, 20)),
            "at": now_us - int(rng.integers(1, 20 * 24)) * US_PER_DAY // 24,
            "amount": float(rng.gamma(2, 15)),
            "country": COUNTRIES[each % 3],
        }
        for each in range(80)
    ]
    rows = [{"card": each, "since": now_us - US_PER_DAY, "home": COUNTRIES[each % 2]} for each in range(0, 20, 3)]
    cards, amounts = list(range(20)), [float(each) for each in range(20)]

    async def scenario() -> dict[str, Any]:
        parts = gateway_parts(Workspace.open(workspace.settings), Meter())
        transport = httpx.ASGITransport(build_app(parts), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            taken = [
                (await client.post("/events", json={"source": source, "events": sent})).json()
                for source, sent in (("payments", events), ("holders", rows), ("holders", rows))
            ]
            inputs = [{"amount": each} for each in amounts]
            answers = {
                "taken": [(each["accepted"], each["late"], each["duplicates"]) for each in taken],
                "features": (await client.get("/features/spending/7")).json(),
                "account": (await client.get("/features/account/3")).json(),
                "without": await client.post("/predict", json={"entity_ids": cards}),
                "predict": (await client.post("/predict", json={"entity_ids": cards, "inputs": inputs})).json(),
                "models": (await client.get("/models")).json(),
                "docs": (await client.get("/openapi.json")).json(),
            }
        await parts.close()
        return answers

    found = asyncio.run(scenario())
    assert [sum(each) for each in found["taken"]] == [80, 7, 7]
    assert found["taken"][2] == (0, 0, 7), "a row of a profile is named by its entity and instant"
    assert found["features"]["features"]["country"] in COUNTRIES
    assert found["features"]["needs_inputs"] == {"amount_ratio": ["amount"]}
    assert "amount_ratio" not in found["features"]["features"]
    assert found["account"]["features"] == {"home": "DE"}
    assert found["without"].status_code == 422
    assert found["without"].json()["error"] == "missing_input"
    assert "'amount'" in found["without"].json()["message"]
    assert found["models"]["models"][0]["inputs"] == {"amount": "float64"}
    body = found["docs"]["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["inputs"]["anyOf"][0]["items"]["required"] == ["amount"]

    # Rings know live events alone: nothing was materialized. The log knows both, once the sink has run.
    Sink.of(workspace).drain_once()
    live = pa.table(
        {name: [each[name] for each in events] for name in payments.schema.names if name != "at"}
        | {"at": pa.array([each["at"] for each in events]).cast(TIMESTAMP)}
    ).select(payments.schema.names)
    served = workspace.offline_store.read_predictions("fraud", start_us=now_us - 1, end_us=now_us + 10**12)
    at_us = served["at"].cast(pa.int64()).to_pylist()[0]
    keys = card.encoded([str(each) for each in cards])
    offline = {
        **compute_features([spending], live, keys, np.full(20, at_us), request={"amount": np.array(amounts)}),
        **compute_features(
            [account],
            holders.identified(pa.Table.from_pylist(rows, schema=holders.given_schema)),
            keys,
            np.full(20, at_us),
        ),
    }
    matrix = np.column_stack([offline[name] for name in fraud.feature_names])
    np.testing.assert_allclose(found["predict"]["predictions"], package.load().predict(matrix), rtol=1e-12)
    order = [served["entity"].to_pylist().index(str(each)) for each in cards]
    logged = np.array([served["features"].to_pylist()[at] for at in order], dtype=float)
    np.testing.assert_allclose(logged, matrix, rtol=1e-12)
    assert served["inputs"].to_pylist()[order[3]] == '{"amount":3.0}'
