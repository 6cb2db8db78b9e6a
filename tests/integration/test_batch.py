"""Batch prediction on a part of CDNOW: everybody once, the same bits, visible at once, repeatable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from configs.churn.cdnow import write_parquet
from configs.churn.definitions import churn, purchases
from heliostat.batch import SCORE, VERSION, BatchReport, predict_all, scorer_of
from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import InvalidValueError, StaleVersionError, UnknownAliasError, UnknownVersionError
from heliostat.features.aggregations import Count
from heliostat.features.bucket_tasks import over_buckets
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.features.offline import compute_features
from heliostat.models.definitions import Definitions, Label, ModelSpec
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.models.rows import AS_OF
from heliostat.settings import ClockSettings, OnlineSettings, Settings
from heliostat.workspace import Workspace

CUSTOMERS = 3_000
JULY = parse_instant_us("1998-07-01")


def _package(spec: ModelSpec, seed: int = 0) -> ModelPackage:
    """A booster with opinions on every feature, learned from noise."""
    rng = np.random.default_rng(seed)
    matrix = np.abs(rng.normal(scale=50, size=(2_000, len(spec.feature_names))))
    labels = (matrix.sum(axis=1) + rng.normal(scale=60, size=2_000) > np.median(matrix.sum(axis=1))).astype(float)
    parameters = {"objective": "binary", "verbosity": -1, "num_leaves": 15, "num_threads": 1, "seed": seed}
    rows = lgb.Dataset(matrix, labels, feature_name=list(spec.feature_names))
    booster = lgb.train(parameters, rows, num_boost_round=30)
    return ModelPackage(booster.model_to_string(), Signature.of(spec), spec.objective)


@pytest.fixture(scope="module")
def workspace(session_home: Path, valkey: str) -> Iterator[Workspace]:
    """Purchases of the first customers, and two versions; the first serves."""
    settings = Settings(
        project="batch",
        home=session_home / "batch",
        online=OnlineSettings(url=valkey),
        clock=ClockSettings(kind="replay", replay_from="1998-07-01"),
    )
    with Workspace.open(settings) as opened:
        file = settings.home / "purchases.parquet"
        write_parquet(file)
        events = pq.read_table(file).filter(pc.field("customer_id") <= CUSTOMERS)
        opened.event_log.append(purchases, events, ingested_us=JULY)
        for seed in (0, 1):
            opened.models.register(churn, _package(churn, seed), lineage={})
        opened.models.promote("churn", 1, force=True, reason="a test")
        yield opened


@pytest.fixture(scope="module")
def report(workspace: Workspace, ray_local: None) -> BatchReport:  # noqa: ARG001 - Ray has to run
    return predict_all(workspace, churn, as_of_us=JULY, cache_above=0.5, cache_ttl_s=3_600)


def test_everybody_known_by_then_is_scored_once(workspace: Workspace, report: BatchReport) -> None:
    events = workspace.event_log.read(purchases, churn.entity, columns=["customer_id"])
    found = workspace.offline_store.read_batch("churn", JULY)
    assert found.column_names == ["customer_id", AS_OF, VERSION, SCORE]
    assert sorted(found.column("customer_id").to_pylist()) == sorted(set(events.column("customer_id").to_pylist()))
    assert set(found.column(VERSION).to_pylist()) == {1}
    assert report.entities == found.num_rows
    assert report.mean_score == pytest.approx(pc.mean(found.column(SCORE)).as_py(), rel=1e-12)
    assert json.loads(json.dumps(report.as_dict()))["as_of"] == "1998-07-01T00:00:00Z"
    assert f"{report.entities:,} entities" in str(report)


@pytest.mark.usefixtures("report")
def test_scores_equal_those_of_one_row_at_a_time_bit_for_bit(workspace: Workspace) -> None:
    found = workspace.offline_store.read_batch("churn", JULY)
    by_key = dict(zip(found.column("customer_id").to_pylist(), found.column(SCORE).to_pylist(), strict=True))
    events = workspace.event_log.read(purchases, churn.entity)
    model = workspace.models.load("churn", 1)
    for customer in np.random.default_rng(0).choice(list(by_key), 60, replace=False).tolist():
        own = events.filter(pc.field("customer_id") == customer)
        features = compute_features(churn.views, own, pa.array([customer], pa.int64()), np.array([JULY]))
        row = np.column_stack([features[name] for name in model.signature.names])
        assert model.predict(row)[0] == by_key[customer]


def test_predictions_above_the_threshold_are_cached_for_a_while_and_no_others(
    workspace: Workspace, report: BatchReport
) -> None:
    found = workspace.offline_store.read_batch("churn", JULY).to_pylist()
    keys = {row["customer_id"]: workspace.online.keys.batch("churn", str(row["customer_id"])) for row in found}
    cached = workspace.online.get_many(list(keys.values()))
    above = {row["customer_id"]: row[SCORE] for row in found if row[SCORE] >= 0.5}
    assert 0 < len(above) < len(found)
    assert report.cached == len(above)
    assert set(cached) == {keys[customer] for customer in above}
    for customer, score in above.items():
        document = json.loads(cached[keys[customer]])
        assert document == {
            "entity": str(customer),
            "score": score,
            "model": "churn",
            "version": 1,
            "as_of": "1998-07-01T00:00:00Z",
        }
    assert 3_000 < workspace.online.client.ttl(keys[next(iter(above))]) <= 3_600


def test_running_it_again_changes_no_row_and_another_version_replaces_them(
    workspace: Workspace, report: BatchReport
) -> None:
    order = [("customer_id", "ascending")]
    before = workspace.offline_store.read_batch("churn", JULY).sort_by(order)
    again = predict_all(workspace, churn, as_of_us=JULY)
    after = workspace.offline_store.read_batch("churn", JULY).sort_by(order)
    assert after.equals(before)
    assert (again.entities, again.mean_score, again.cached) == (report.entities, report.mean_score, 0)

    earlier = parse_instant_us("1997-03-01")
    assert predict_all(workspace, churn, version=2, as_of_us=earlier).entities < report.entities
    assert workspace.offline_store.batches("churn") == [earlier, JULY]
    assert set(workspace.offline_store.read_batch("churn", earlier).column(VERSION).to_pylist()) == {2}
    assert workspace.offline_store.read_batch("churn", JULY).sort_by(order).equals(before)


def _refuse(bucket: int) -> pa.Table:
    if bucket == 2:
        raise InvalidValueError("bucket", str(bucket), "another one")
    return pa.table({"id": [bucket]})


@pytest.mark.usefixtures("ray_local")
def test_error_of_a_bucket_comes_out_as_itself() -> None:
    with pytest.raises(InvalidValueError, match="'2' isn't usable; expected another one"):
        list(over_buckets(_refuse, 3))
    assert sorted(each["id"][0].as_py() for each in over_buckets(_refuse, 2)) == [0, 1]


def test_what_does_not_exist_and_what_is_not_known_yet_is_refused(workspace: Workspace) -> None:
    with pytest.raises(UnknownVersionError, match="it has: 1, 2"):
        scorer_of(workspace, churn, version=9)
    with pytest.raises(UnknownAliasError, match="staging"):
        scorer_of(workspace, churn, version="staging")
    with pytest.raises(InvalidValueError, match="up to now"):
        scorer_of(workspace, churn, as_of_us=workspace.clock.now_us() + US_PER_DAY)


def test_version_of_other_definitions_is_refused(home: Path, valkey: str, workspace: Workspace) -> None:
    changed = FeatureView(
        "recent_purchases", version=2, source=purchases, features={"count_30d": Count(window="40d")}
    )
    settings = workspace.settings.model_copy(update={"project": f"t{home.name}", "home": home})
    with Workspace.open(settings) as other:
        other.models.register(churn, _package(churn), lineage={})
        other.definitions = Definitions.of([changed, churn.views[1]])  # type: ignore[misc]
        with pytest.raises(StaleVersionError, match="recent_purchases"):
            scorer_of(other, churn, version=1, as_of_us=JULY)
    assert settings.online.url == valkey


def test_entities_with_several_text_keys_are_scored_and_cached_by_their_text(home: Path, valkey: str) -> None:
    shop = Entity("shop", keys={"country": "string", "street": "string"})
    schema = pa.schema({"id": pa.int64(), "country": pa.string(), "street": pa.string(), "at": pa.timestamp("us")})
    sales = EventSource("sales", schema=schema, entity=shop, event_time="at", event_id="id")
    view = FeatureView("sold", version=1, source=sales, features={"n": Count(window="30d"), "all": Count()})
    spec = ModelSpec("closes", shop, [view], Label.none_within("closed", sales, "30d"))
    settings = Settings(project=f"t{home.name}", home=home, online=OnlineSettings(url=valkey))
    with Workspace.open(settings) as workspace:
        workspace.definitions = Definitions.of([spec])  # type: ignore[misc]
        streets = ["Rue|1", "Weg 2", "Weg 2"]
        day = pa.array([0, US_PER_DAY, 2 * US_PER_DAY], pa.timestamp("us"))
        events = pa.table([pa.array([1, 2, 3]), pa.array(["fr", "de", "de"]), pa.array(streets), day], schema=schema)
        workspace.event_log.append(sales, events, ingested_us=0)
        workspace.models.register(spec, _package(spec), lineage={})
        scorer = scorer_of(workspace, spec, version=1, as_of_us=3 * US_PER_DAY, cache_above=0.0)
        done = [scorer.run(bucket).to_pylist()[0] for bucket in workspace.event_log.buckets]
        assert sum(each["entities"] for each in done) == sum(each["cached"] for each in done) == 2
        for key in ({"country": "fr", "street": "Rue|1"}, {"country": "de", "street": "Weg 2"}):
            name = workspace.online.keys.batch("closes", shop.text(key))
            assert name in workspace.online.get_many([name])
