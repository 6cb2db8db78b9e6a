from __future__ import annotations

from typing import Any

import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pytest

from heliostat.clock import US_PER_DAY
from heliostat.errors import TrainingDataError
from heliostat.features.aggregations import Count
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.models.definitions import Label, ModelSpec
from heliostat.models.rows import AS_OF, LABEL
from heliostat.schema import TIMESTAMP
from heliostat.settings import TrainingSettings
from heliostat.training.dataset import Split, TrainingSet
from heliostat.training.fitting import Fold, Recipe, drawn_parameters, fit_watched, make_fold

DAY = US_PER_DAY
USER = Entity("user", keys={"user_id": "int64"})
ORDERS = EventSource(
    "orders",
    schema=pa.schema({"id": pa.int64(), "user_id": pa.int64(), "at": pa.timestamp("us"), "amount": pa.float64()}),
    entity=USER,
    event_time="at",
    event_id="id",
)
VIEW = FeatureView(
    "activity", version=1, source=ORDERS, features={"short": Count(window="30d"), "long": Count(window="60d")}
)
LEFT = Label.none_within("left", ORDERS, "10d")


def _spec(**changes: Any) -> ModelSpec:
    return ModelSpec(**{"name": "m", "entity": USER, "features": [VIEW], "label": LEFT, **changes})


def _training_set(spec: ModelSpec, days: tuple[int, ...], users: int = 400) -> TrainingSet:
    """The label follows the first feature with noise; the second is noise alone. Validation is on day 100."""
    rng = np.random.default_rng(0)
    n = users * (len(days) + 1)
    short = rng.normal(size=n)
    outcome = 2 * short + rng.normal(size=n)
    table = pa.table(
        {
            "user_id": np.tile(np.arange(users), len(days) + 1),
            AS_OF: pa.array(np.repeat([day * DAY for day in (*days, 100)], users)).cast(TIMESTAMP),
            LABEL: outcome if spec.objective == "regression" else (outcome > 0).astype(float),
            "activity__short": short,
            "activity__long": rng.normal(size=n),
        }
    )
    return TrainingSet(spec, table, Split(tuple(day * DAY for day in days), (100 * DAY,)), {"orders": 0})


def _fit(spec: ModelSpec, fold: Fold, drawn: dict[str, Any] | None = None, **settings: Any) -> Any:
    chosen = TrainingSettings(**{"rounds": 60, "early_stopping_rounds": 10, **settings})
    return fit_watched(Recipe.of(spec, seed=7), fold, drawn or {}, chosen)


# ── What is tried ───────────────────────────────────────────────────────────────────


def test_the_declared_parameters_are_always_tried_first() -> None:
    spec = _spec(search_space={"learning_rate": (0.01, 0.3)})
    assert drawn_parameters(spec, 0, seed=1) == [{}]
    assert drawn_parameters(_spec(), 9, seed=1) == [{}]
    sets = drawn_parameters(spec, 4, seed=1)
    assert sets[0] == {}
    assert len(sets) == 4
    assert sets == drawn_parameters(spec, 4, seed=1)
    assert sets != drawn_parameters(spec, 4, seed=2)


def test_ranges_are_drawn_inside_their_ends_and_on_their_scale() -> None:
    space = {
        "learning_rate": (0.001, 1.0),
        "num_leaves": (4, 64),
        "lambda_l1": (0.0, 2.0),
        "boosting": ("a", "b"),
    }
    sets = drawn_parameters(_spec(search_space=space), 400, seed=0)[1:]
    rates = np.array([each["learning_rate"] for each in sets])
    leaves = [each["num_leaves"] for each in sets]
    assert 0.001 <= rates.min() <= rates.max() <= 1.0
    assert np.median(rates) == pytest.approx(np.sqrt(0.001), rel=0.5)
    assert all(isinstance(each, int) for each in leaves)
    assert (min(leaves), max(leaves)) == (4, 64)
    assert np.median(leaves) == pytest.approx(16, abs=5)
    assert np.mean([each["lambda_l1"] for each in sets]) == pytest.approx(1.0, abs=0.15)
    assert {each["boosting"] for each in sets} == {"a", "b"}


@pytest.mark.parametrize("choices", [(7, 15, 31), (True, False), (31, 7), ("a", "b")])
def test_anything_that_is_no_rising_pair_of_numbers_is_choices(choices: tuple[Any, ...]) -> None:
    sets = drawn_parameters(_spec(search_space={"x": choices}), 60, seed=0)[1:]
    assert {each["x"] for each in sets} == set(choices)


def test_declared_parameters_reach_lightgbm_but_not_over_the_objective() -> None:
    recipe = Recipe.of(_spec(params={"num_leaves": 7, "objective": "poisson", "seed": 3}), seed=9)
    assert recipe.parameters["num_leaves"] == 7
    assert recipe.parameters["objective"] == "binary"
    assert recipe.parameters["seed"] == 3
    spend = Label.sum_within("spend", ORDERS, "amount", "10d")
    assert Recipe.of(_spec(label=spend, objective="regression", metric="mae"), seed=9).parameters["metric"] == "l1"


# ── Folds ───────────────────────────────────────────────────────────────────────────


def test_the_last_training_instant_is_watched_and_those_a_horizon_earlier_are_learned_from() -> None:
    training_set = _training_set(_spec(), (20, 25, 30, 40))
    fold = make_fold(training_set)
    assert set(fold.watch.as_of_us // DAY) == {40}
    assert set(fold.fit.as_of_us // DAY) == {20, 25, 30}


def test_validation_rows_are_in_no_fold() -> None:
    training_set = _training_set(_spec(), (20, 40))
    fold = make_fold(training_set)
    assert 100 not in set(np.concatenate([fold.fit.as_of_us, fold.watch.as_of_us]) // DAY)
    assert len(fold.fit) + len(fold.watch) == len(training_set.training)


def test_when_time_allows_no_split_whole_entities_are_watched() -> None:
    fold = make_fold(_training_set(_spec(), (36, 40)))
    assert not set(fold.fit.entities) & set(fold.watch.entities)
    assert len(fold.watch) / (len(fold.fit) + len(fold.watch)) == pytest.approx(0.2, abs=0.06)


def test_watched_rows_of_one_class_are_refused_with_what_to_do() -> None:
    training_set = _training_set(_spec(), (20, 40))
    labels = training_set.table.column(LABEL).to_numpy().copy()
    labels[training_set.examples.as_of_us == 40 * DAY] = 1.0
    place = training_set.table.column_names.index(LABEL)
    constant = TrainingSet(
        training_set.spec,
        training_set.table.set_column(place, LABEL, pa.array(labels)),
        training_set.split,
        training_set.log_versions,
    )
    with pytest.raises(TrainingDataError, match=r"400 rows to watch, all labelled 1; take more"):
        make_fold(constant)


# ── One trial ───────────────────────────────────────────────────────────────────────


def test_trial_finds_the_signal_and_stops_before_its_last_round() -> None:
    spec = _spec()
    found = _fit(spec, make_fold(_training_set(spec, (20, 40))), rounds=400)
    assert found.value > 0.85
    assert 1 <= found.rounds < 400
    assert found.parameters == {}


def test_trial_of_a_regression_is_measured_by_its_own_metric() -> None:
    spend = Label.sum_within("spend", ORDERS, "amount", "10d")
    spec = _spec(label=spend, objective="regression", metric="mae")
    found = _fit(spec, make_fold(_training_set(spec, (20, 40))))
    assert found.value == pytest.approx(0.8, abs=0.25)  # the noise's own mean distance


def test_the_same_rows_and_seed_give_the_same_trial() -> None:
    spec = _spec(params={"bagging_fraction": 0.5, "bagging_freq": 1})
    fold = make_fold(_training_set(spec, (20, 40)))
    assert _fit(spec, fold, {"num_leaves": 5}) == _fit(spec, fold, {"num_leaves": 5})


def test_trial_reports_rounds_and_loss_as_it_goes() -> None:
    spec = _spec()
    told: list[dict[str, float]] = []
    settings = TrainingSettings(rounds=60, early_stopping_rounds=60)
    fold = make_fold(_training_set(spec, (20, 40)))
    fit_watched(Recipe.of(spec, seed=7), fold, {}, settings, report=lambda each: told.append(dict(each)))
    assert [each["rounds"] for each in told] == [20, 40, 60]
    assert all(0 < each["loss"] < 1 for each in told)


def test_rounds_of_a_trial_are_the_best_ones_of_a_plain_fit() -> None:
    spec = _spec()
    fold = make_fold(_training_set(spec, (20, 40)))
    recipe = Recipe.of(spec, seed=7)
    found = _fit(spec, fold, rounds=60, early_stopping_rounds=60)
    booster = lgb.train(
        {**recipe.parameters, "num_threads": 1}, lgb.Dataset(fold.fit.matrix, fold.fit.labels), num_boost_round=60
    )
    losses = []
    for rounds in range(1, 61):
        p = np.clip(booster.predict(fold.watch.matrix, num_iteration=rounds), 1e-15, 1 - 1e-15)
        losses.append(-np.mean(fold.watch.labels * np.log(p) + (1 - fold.watch.labels) * np.log1p(-p)))
    assert found.rounds == 1 + int(np.argmin(losses))
    assert found.loss == pytest.approx(min(losses), rel=1e-6)
