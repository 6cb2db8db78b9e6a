"""From rows to a booster: a small search with Ray Tune, the final fit with Ray Train.

Search trials are plain functions that call LightGBM, each on one CPU: a trial inside Ray Train would
start a worker group for every one of them. They learn from the earlier training instants and watch
the last ones, so the number of rounds and the parameters are chosen out of time, and the
validation rows that the gate judges by are seen by nobody. The final fit takes all training
rows with the rounds that were found, on as many workers as the settings say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightgbm as lgb
import numpy as np
import ray

from heliostat.errors import TrainingDataError, TrainingFailedError
from heliostat.models.categories import Categories
from heliostat.models.definitions import ModelSpec
from heliostat.models.metrics import FloatArray, metric_named, point
from heliostat.settings import TrainingSettings
from heliostat.training.dataset import Examples, TrainingSet

Parameters = Mapping[str, Any]
Report = Callable[[Mapping[str, float]], None]

REPORT_EVERY = 20
_WATCH_SHARE = 5  # one entity in so many is watched when time doesn't allow a split
_GRACE_ROUNDS = 60
# Addresses of the workers, which LightGBM writes into its text.
_OF_THIS_RUN = ("[machines:", "[local_listen_port:", "[machine_list_filename:")
_LOSSES = {"binary": ("binary", "binary_logloss"), "regression": ("regression", "l2")}


# ── What is tried ───────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Recipe:
    """What a fit needs to know of a model: plain values, so that workers needn't import declarations.

    Attributes:
        model: The model's name.
        names: Qualified feature names, in the matrix's order.
        metric: What trials are compared by.
        parameters: LightGBM parameters that no search changes.
        categorical: Columns that are categories.
    """

    model: str
    names: tuple[str, ...]
    metric: str
    parameters: Parameters
    categorical: tuple[int, ...] = ()

    @classmethod
    def of(cls, spec: ModelSpec, *, seed: int) -> Recipe:
        """The recipe of a declared model.

        Training watches the objective's own loss whatever the model's metric is: a ranking metric peaks
        long before the probabilities are calibrated.
        """
        objective, loss = _LOSSES[spec.objective]
        if spec.metric == "mae":
            objective, loss = "regression_l1", "l1"
        parameters = {
            "seed": seed,
            **spec.params,
            "objective": objective,
            "metric": loss,
            # The same bits for the same rows, whatever the number of threads.
            "deterministic": True,
            "force_row_wise": True,
            "verbosity": -1,
        }
        columns = tuple(spec.feature_names.index(name) for name in spec.categorical)
        return cls(spec.name, spec.feature_names, spec.metric, parameters, columns)

    def dataset(self, matrix: FloatArray, labels: FloatArray, parameters: Parameters) -> lgb.Dataset:
        """Rows as LightGBM takes them; categories encoded."""
        return lgb.Dataset(
            matrix,
            labels,
            feature_name=list(self.names),
            categorical_feature=list(self.categorical) or "auto",
            params=dict(parameters),
        )


def drawn_parameters(spec: ModelSpec, trials: int, *, seed: int) -> list[dict[str, Any]]:
    """The parameter sets that a search tries: what is declared first, then random draws.

    Args:
        spec: Its ``search_space``: choices, or ``(low, high)`` for a range (logarithmic if both are
            above 0; whole numbers if both are).
        trials: How many, the declared set included.
        seed: Of the draws.

    Returns:
        At least one set; each goes over the recipe's parameters.
    """
    rng = np.random.default_rng(seed)
    drawn: list[dict[str, Any]] = [{}]
    if spec.search_space:
        drawn.extend(
            {name: _draw(tuple(values), rng) for name, values in spec.search_space.items()}
            for _ in range(max(trials, 1) - 1)
        )
    return drawn


def _draw(values: tuple[Any, ...], rng: np.random.Generator) -> Any:  # noqa: ANN401 - whatever LightGBM takes
    if not _is_range(values):
        return values[int(rng.integers(len(values)))]
    low, high = values
    whole = isinstance(low, int) and isinstance(high, int)
    top = high + 1 if whole else high
    value = math.exp(rng.uniform(math.log(low), math.log(top))) if low > 0 else rng.uniform(low, top)
    return min(int(value), high) if whole else float(value)


def _is_range(values: tuple[Any, ...]) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return len(values) == 2 and numbers and values[0] < values[1]


# ── One trial ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Fold:
    """What trials learn from, and what they watch.

    Attributes:
        fit: Learned from.
        watch: Watched: decides on rounds and parameters.
    """

    fit: Examples
    watch: Examples


@dataclass(frozen=True)
class Trial:
    """One parameter set, tried.

    Attributes:
        parameters: What was drawn.
        rounds: Boosting rounds that were best.
        value: The model's metric on the watched rows; None if the search stopped it early.
        loss: What training watched.
    """

    parameters: Parameters
    rounds: int
    value: float | None
    loss: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"parameters": dict(self.parameters), "rounds": self.rounds, "value": self.value, "loss": self.loss}


def make_fold(training_set: TrainingSet, categories: Categories | None = None) -> Fold:
    """Part the training rows: the last instants are watched, those a label horizon earlier learned from.

    When time doesn't allow that, one entity in five is watched instead.

    Args:
        training_set: Its training rows.
        categories: How categories are encoded.

    Raises:
        TrainingDataError: If a part would be empty, or has one class only.
    """
    spec, training = training_set.spec, encoded(training_set.training, training_set.spec, categories)
    watched_us = training_set.split.watched_from_us(training.as_of_us)
    early = training.as_of_us <= watched_us - spec.label.horizon_us
    watch = training.as_of_us >= watched_us
    if not early.any():
        watch = training.entities.view(np.uint64) % np.uint64(_WATCH_SHARE) == 0
        early = ~watch
    for name, mask in (("learn from", early), ("watch", watch)):
        labels = training.labels[mask]
        if not len(labels) or (spec.objective == "binary" and labels.min() == labels.max()):
            problem = f"{len(labels)} rows to {name}" + (f", all labelled {labels[0]:g}" if len(labels) else "")
            raise TrainingDataError(spec.name, problem, "take more or other instants, or a larger population")
    return Fold(training.where(early), training.where(watch))


def encoded(examples: Examples, spec: ModelSpec, categories: Categories | None) -> Examples:
    """Rows as the booster takes them."""
    if not categories:
        return examples
    return replace(examples, matrix=categories.encoded(examples.matrix, spec.feature_names))


def fit_watched(
    recipe: Recipe, fold: Fold, drawn: Parameters, settings: TrainingSettings, *, report: Report | None = None
) -> Trial:
    """Fit one parameter set, until the watched rows' loss stops falling. On one thread.

    Args:
        recipe: What is fitted.
        fold: Rows.
        drawn: Parameters over the recipe's.
        settings: Rounds at most, and rounds without progress before it stops.
        report: Told ``loss`` and ``rounds`` every so often.
    """
    parameters = {**recipe.parameters, **drawn, "num_threads": 1}
    fit = recipe.dataset(fold.fit.matrix, fold.fit.labels, parameters)
    watch = lgb.Dataset(fold.watch.matrix, fold.watch.labels, reference=fit)

    def told(env: lgb.callback.CallbackEnv) -> None:
        if report is not None and (env.iteration + 1) % REPORT_EVERY == 0:
            report({"loss": float(env.evaluation_result_list[0][2]), "rounds": env.iteration + 1})

    booster = lgb.train(
        parameters,
        fit,
        num_boost_round=settings.rounds,
        valid_sets=[watch],
        callbacks=[told, lgb.early_stopping(settings.early_stopping_rounds, verbose=False)],
    )
    best = max(booster.best_iteration, 1)
    scores = np.asarray(booster.predict(fold.watch.matrix, num_iteration=best, num_threads=1))
    loss = float(next(iter(booster.best_score["valid_0"].values())))
    return Trial(dict(drawn), best, point(recipe.metric, fold.watch.labels, scores), loss)


# ── The search ──────────────────────────────────────────────────────────────────────


def search(
    recipe: Recipe, fold: Fold, sets: Sequence[Parameters], settings: TrainingSettings, *, storage: str
) -> tuple[Trial, ...]:
    """Try parameter sets, several at a time; hopeless ones are stopped early (ASHA).

    Args:
        recipe: What is fitted.
        fold: Rows.
        sets: What `drawn_parameters` gave.
        settings: Rounds, and how many trials at a time.
        storage: Folder for Tune's own files.

    Returns:
        The trials, best first; those that were stopped early at the end.

    Raises:
        TrainingFailedError: If no trial came to an end.
    """
    if len(sets) == 1:
        return (fit_watched(recipe, fold, sets[0], settings),)
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    def trial(config: dict[str, Any], fold: Fold) -> None:
        found = fit_watched(recipe, fold, sets[config["index"]], settings, report=tune.report)
        # The last word comes after all rounds, so that the scheduler doesn't take it for a step.
        tune.report({"loss": found.loss, "rounds": settings.rounds + 1, "best": found.rounds, "value": found.value})

    scheduler = ASHAScheduler(
        time_attr="rounds",
        metric="loss",
        mode="min",
        max_t=settings.rounds + 1,
        # Small steps look bad at first: a third of all rounds is a fair hearing.
        grace_period=min(max(_GRACE_ROUNDS, settings.rounds // 3), settings.rounds),
    )
    results = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, fold=fold), {"cpu": 1}),
        param_space={"index": tune.grid_search(list(range(len(sets))))},
        tune_config=tune.TuneConfig(
            scheduler=scheduler, max_concurrent_trials=settings.concurrent_trials, reuse_actors=True
        ),
        run_config=tune.RunConfig(name="search", storage_path=storage, verbose=0),
    ).fit()
    done, stopped, problems = [], [], []
    for result in results:
        if result.error is not None:
            problems.append(_last_line(result.error))
            continue
        drawn, metrics = sets[result.config["index"]], result.metrics
        if metrics.get("value") is None:
            stopped.append(Trial(drawn, int(metrics["rounds"]), None, float(metrics["loss"])))
        else:
            done.append(Trial(drawn, int(metrics["best"]), float(metrics["value"]), float(metrics["loss"])))
    if not done:
        raise TrainingFailedError(recipe.model, "no trial of the search came to an end", "; ".join(problems[:3]))
    sign = -1.0 if metric_named(recipe.metric).larger_is_better else 1.0
    return (*sorted(done, key=lambda each: sign * (each.value or 0.0)), *stopped)


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


# ── The final fit ───────────────────────────────────────────────────────────────────


def fit_final(recipe: Recipe, training: Examples, best: Trial, *, workers: int, storage: str) -> str:
    """Fit all training rows with Ray Train, spread over its workers.

    Args:
        recipe: What is fitted.
        training: Rows.
        best: Parameters and rounds.
        workers: How many; each gets an equal part of the rows and one CPU.
        storage: Folder for Train's own files.

    Returns:
        LightGBM's text of the booster.

    Raises:
        TrainingFailedError: If a worker fails, twice.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.lightgbm import LightGBMTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError as WorkersFailedError

    parts = np.array_split(np.arange(len(training)), workers)
    trainer = LightGBMTrainer(
        _fit_worker,
        train_loop_config={
            "parameters": {**recipe.parameters, **best.parameters, "num_threads": 1},
            "rounds": best.rounds,
            "recipe": recipe,
            # Not a Ray Dataset: its shards differ from run to run, and so would the booster.
            "shards": [ray.put((training.matrix[rows], training.labels[rows])) for rows in parts],
        },
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="fit", storage_path=storage, failure_config=FailureConfig(max_failures=1)),
    )
    try:
        result = trainer.fit()
    except WorkersFailedError as error:
        raise TrainingFailedError(recipe.model, "the final fit failed", _last_line(error)) from error
    text: str = result.return_value
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(_OF_THIS_RUN))


def _fit_worker(config: dict[str, Any]) -> str:
    """What every worker of the final fit runs; all of them end with the same booster."""
    from ray.train import get_context
    from ray.train.lightgbm import get_network_params

    context = get_context()
    matrix, labels = ray.get(config["shards"][context.get_world_rank()])
    parameters = dict(config["parameters"])
    if context.get_world_size() > 1:
        parameters |= {"tree_learner": "data", "pre_partition": True, **get_network_params()}
    rows = config["recipe"].dataset(matrix, labels, parameters)
    return str(lgb.train(parameters, rows, num_boost_round=config["rounds"]).model_to_string())
