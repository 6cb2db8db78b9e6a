"""One call from a declaration to a registered, judged and perhaps promoted version: `train`.

The candidate is registered whatever the gate says: a version that wasn't let through can be
looked at, shadowed or compared. The gate's report is kept with it; promotion is a compare-and-swap
on the alias as it was when production was measured.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from heliostat.clock import format_instant, parse_duration_us, parse_instant_us
from heliostat.errors import StaleVersionError
from heliostat.features.definitions import FeatureRef, request_types
from heliostat.models.categories import Categories
from heliostat.models.definitions import ModelSpec
from heliostat.models.metrics import Estimate, FloatArray, gain, measure, metric_named
from heliostat.models.packaging import LoadedModel, ModelPackage, Signature
from heliostat.models.profile import Profile
from heliostat.models.registry import PRODUCTION
from heliostat.models.rows import version_features
from heliostat.models.spine import ModelSpine
from heliostat.training.dataset import (
    Split,
    TrainingSet,
    build_training_set,
    first_event_us,
    split_instants,
    split_spine,
)
from heliostat.training.evaluation import (
    Evaluation,
    GateReport,
    Parity,
    Rows,
    SingleFeatureBaseline,
    baseline_feature,
    default_slices,
    evaluate,
    judge,
)
from heliostat.training.fitting import Recipe, Trial, drawn_parameters, encoded, fit_final, make_fold, search
from heliostat.training.lineage import lineage_of
from heliostat.workspace import Workspace

"""A reference profile from the training rows' features, their names and their scores."""
Progress = Callable[[str], None]

_LATENCY_ROWS = 200


@dataclass(frozen=True)
class Baseline:
    """What sorting by one feature would have given on the same rows.

    Attributes:
        feature: Its qualified name.
        metric: The metric that the two are compared by.
        estimate: The baseline's.
        gain: How much better the candidate is; above 0 is better.
    """

    feature: str
    metric: str
    estimate: Estimate
    gain: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "feature": self.feature,
            "metric": self.metric,
            "estimate": self.estimate.as_dict(),
            "gain": self.gain.as_dict(),
        }


@dataclass(frozen=True)
class TrainingReport:
    """What a training did.

    Attributes:
        model: The model's name.
        version: The candidate's number in the registry.
        fingerprint: Of the training set.
        split: At which instants.
        rows: Training rows and validation rows.
        trials: Of the search, best first.
        evaluation: The candidate's figures on the validation rows.
        baseline: The plain baseline's.
        gate: The gate's report.
        compared_with: The production version that the gate compared with; None: there was none.
        promoted: Whether the candidate serves now.
        seconds: How long each stage took.
    """

    model: str
    version: int
    fingerprint: str
    split: Split
    rows: tuple[int, int]
    trials: tuple[Trial, ...]
    evaluation: Evaluation
    baseline: Baseline
    gate: GateReport
    compared_with: int | None
    promoted: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "train": [format_instant(each) for each in self.split.train_us],
            "validation": [format_instant(each) for each in self.split.validation_us],
            "rows": {"train": self.rows[0], "validation": self.rows[1]},
            "trials": [trial.as_dict() for trial in self.trials],
            "evaluation": self.evaluation.as_dict(),
            "baseline": self.baseline.as_dict(),
            "gate": self.gate.as_dict(),
            "compared_with": self.compared_with,
            "promoted": self.promoted,
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
        }

    def lines(self) -> list[str]:
        """The same for a person to read."""
        metric, baseline, split = self.evaluation.metric, self.baseline, self.split
        tried = f"{len(self.trials)} parameter sets tried" if len(self.trials) > 1 else "declared parameters"
        learned = f"{self.rows[0]:,} rows to learn from at {len(split.train_us)} instants"
        judged = f"{self.rows[1]:,} to judge by at {len(split.validation_us)}"
        plain = f"{baseline.estimate} ({baseline.metric} of {baseline.feature} alone; gain {baseline.gain})"
        rest = {name: str(each) for name, each in self.evaluation.metrics.items() if name != metric}
        lines = [f"{self.model} version {self.version}: {learned}, {judged}; {tried}, {self.trials[0].rounds} rounds"]
        figures = {metric: str(self.evaluation.main), "baseline": plain, **rest}
        lines.extend(f"  {name:<18} {figure}" for name, figure in figures.items())
        lines.append(f"gate: {'passed' if self.gate.passed else 'not passed'}")
        lines.extend(f"  {'ok' if each.passed else 'NO'}  {each.name}: {each.reason}" for each in self.gate.checks)
        if self.promoted:
            lines.append(f"version {self.version} is in production now")
        return lines


def train(
    workspace: Workspace,
    spec: ModelSpec,
    *,
    instants_us: Sequence[int] = (),
    validation_us: Sequence[int] = (),
    spine: pa.Table | None = None,
    promote: bool = False,
    reason: str = "",
    progress: Progress | None = None,
) -> TrainingReport:
    """Build the training set, search, fit, judge, register, and promote if asked and let through.

    Ray must be connected.

    Args:
        workspace: Log, registry, clock and settings.
        spec: The model.
        instants_us: Training instants; by default the settings', else chosen (see `split_instants`).
        validation_us: Validation instants; by default the settings' if ``instants_us`` aren't given either.
        spine: The rows themselves: key columns, ``as_of`` and the model's inputs of the request. The first
            validation instant says from when on they validate; by default the last fifth does.
        promote: Make the candidate production if the gate lets it through.
        reason: Why it is promoted; a sentence for the record.
        progress: Told what happens next.

    Raises:
        MissingInputError: If the model takes inputs of the request, and no spine is given.
        SpineError: If the spine lacks a column, or has one of the wrong type.
        TrainingDataError: If the instants or the rows don't allow it.
        TrainingFailedError: If the search or the fit breaks down.
        PromotionConflictError: If somebody else has moved the alias meanwhile.
    """
    settings, tell = workspace.settings.training, progress or (lambda _: None)
    stopwatch = _Stopwatch()
    with stopwatch.stage("rows"):
        tell("building the training set")
        production = Production.of(workspace, spec)
        given = None
        if spine is None:
            split = _split(workspace, spec, instants_us, validation_us)
        else:
            production = production and production.beside(spec, spine)
            also = None if production is None else request_types(production.features)
            given = ModelSpine.of(spine, spec, workspace.event_log.n_buckets, also=also)
            now_us, horizon_us = workspace.clock.now_us(), spec.label.horizon_us
            split = split_spine(given, validation_us, horizon_us=horizon_us, now_us=now_us, model=spec.name)
        needed = () if production is None else production.features
        training_set = build_training_set(spec, workspace.event_log, split, extra=needed, spine=given)
        training = training_set.training
    recipe = Recipe.of(spec, seed=settings.seed)
    categories = Categories.learned(training.matrix, spec.feature_names, spec.categorical)
    with _scratch(workspace) as storage:
        with stopwatch.stage("search"):
            sets = drawn_parameters(spec, settings.trials, seed=settings.seed)
            what = f"{len(sets)} parameter sets" if len(sets) > 1 else "the declared parameters"
            tell(f"trying {what} on {len(training):,} rows")
            trials = search(recipe, make_fold(training_set, categories), sets, settings, storage=storage)
        with stopwatch.stage("fit"):
            tell(f"fitting {trials[0].rounds} rounds on {settings.workers} worker(s)")
            text = fit_final(
                recipe, encoded(training, spec, categories), trials[0], workers=settings.workers, storage=storage
            )
    with stopwatch.stage("verdict"):
        tell(f"judging on {len(training_set.validation):,} rows that no step has seen")
        parameters = {**recipe.parameters, **trials[0].parameters, "rounds": trials[0].rounds}
        package = ModelPackage(text, Signature.of(spec), spec.objective, parameters=parameters, categories=categories)
        report = conclude(workspace, spec, training_set, package, trials, production=production)
        if promote and report.gate.passed:
            tell(f"promoting version {report.version}")
            report = promote_candidate(workspace, report, production=production, reason=reason)
    return replace(report, seconds=stopwatch.seconds)


def conclude(
    workspace: Workspace,
    spec: ModelSpec,
    training_set: TrainingSet,
    package: ModelPackage,
    trials: Sequence[Trial],
    *,
    production: Production | None,
) -> TrainingReport:
    """Judge a fitted model on the validation rows, and register it with its evidence. Needs no Ray.

    Args:
        workspace: Registry and settings.
        spec: The model.
        training_set: What it was fitted on, and is judged by.
        package: The fitted booster and its parameters.
        trials: Of the search, best first.
        production: The version to compare with; None: nothing serves.
    """
    settings = workspace.settings.training
    training, validation = training_set.training, training_set.validation
    candidate = package.load()
    scores = candidate.predict(validation.matrix)
    column = spec.feature_names.index(baseline_feature(spec))
    slices = default_slices(validation.as_of_us, {spec.feature_names[column]: validation.matrix[:, column]})
    rows = Rows(validation.labels, validation.entities, slices)
    evaluation = evaluate(spec, rows, scores, seed=settings.seed)
    gate = judge(
        spec,
        rows,
        scores,
        evaluation,
        signature=candidate.signature.names,
        production=None if production is None else production.scores(training_set),
        incomparable=None if production is None else production.problem,
        latency_ms=_latency_ms(candidate, validation.matrix),
        parity=None if production is None else _parity(workspace, spec, production.version),
        seed=settings.seed,
    )
    baseline = _baseline(spec, training_set, rows, scores, column)
    compared_with = None if production is None or production.problem else production.version
    profile = Profile.of(training.matrix, spec.feature_names, candidate.predict(training.matrix)).to_document()
    version = workspace.models.register(
        spec,
        replace(package, profile=profile, metrics={**evaluation.as_dict(), "baseline": baseline.as_dict()}),
        lineage=lineage_of(training_set, settings, trials, compared_with=compared_with),
    ).version
    workspace.models.record_gate(spec.name, version, gate.as_dict())
    return TrainingReport(
        model=spec.name,
        version=version,
        fingerprint=training_set.fingerprint,
        split=training_set.split,
        rows=(len(training), len(validation)),
        trials=tuple(trials),
        evaluation=evaluation,
        baseline=baseline,
        gate=gate,
        compared_with=compared_with,
    )


def _parity(workspace: Workspace, spec: ModelSpec, version: int) -> Parity:
    """What the newest parity check said of the version that serves."""
    with workspace.catalog.read() as rows:
        found = rows.verdicts(spec.name, version=version, kind="parity", limit=1)
    oldest_us = workspace.clock.now_us() - parse_duration_us(workspace.configured.monitoring.window)
    at_us = found[0].at_us if found else 0
    return Parity.of(found[0].document if found else None, version=version, at_us=at_us, oldest_us=oldest_us)


def promote_candidate(
    workspace: Workspace, report: TrainingReport, *, production: Production | None, reason: str = ""
) -> TrainingReport:
    """Make a judged candidate the one that serves, if production is still what it was compared with.

    Raises:
        GateFailedError: If the gate didn't let it through.
        PromotionConflictError: If somebody else has moved the alias meanwhile.
    """
    workspace.promote(
        report.model,
        report.version,
        expected_revision=0 if production is None else production.revision,
        gate=report.gate.as_dict(),
        evidence={"evaluation": report.evaluation.as_dict(), "fingerprint": report.fingerprint},
        reason=reason or "trained, and the gate let it through",
    )
    return replace(report, promoted=True)


def _split(workspace: Workspace, spec: ModelSpec, instants_us: Sequence[int], validation_us: Sequence[int]) -> Split:
    settings = workspace.settings.training
    if not instants_us and not validation_us:
        instants_us = [parse_instant_us(each) for each in settings.instants]
        validation_us = [parse_instant_us(each) for each in settings.validation_instants]
    return split_instants(
        instants_us,
        validation_us,
        horizon_us=spec.label.horizon_us,
        now_us=workspace.clock.now_us(),
        first_event_us=first_event_us(spec, workspace.event_log),
        model=spec.name,
    )


# ── Production ──────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Production:
    """The version that serves now, to be compared with.

    Attributes:
        version: Its number.
        revision: The alias's revision: a promotion fails if it has moved since.
        model: Loaded.
        features: What it needs, as declared now.
        problem: Why it can't be compared; empty if it can.
    """

    version: int
    revision: int
    model: LoadedModel
    features: tuple[FeatureRef, ...]
    problem: str

    @classmethod
    def of(cls, workspace: Workspace, spec: ModelSpec) -> Production | None:
        """The production version of a model; None if nothing serves."""
        alias = workspace.models.alias(spec.name, PRODUCTION)
        if alias is None:
            return None
        registered, problem = workspace.models.get(spec.name, alias.version), ""
        features: tuple[FeatureRef, ...] = ()
        try:
            features = version_features(registered, workspace.definitions.views, spec)
        except StaleVersionError as error:
            problem = f"{', '.join(error.views)}, which it was trained on, isn't declared any more"
        if registered.lineage.get("label_hash", spec.label.content_hash) != spec.label.content_hash:
            problem = f"label {spec.label.name!r} means something else since it was trained"
        model = workspace.models.load(spec.name, alias.version)
        return cls(alias.version, alias.revision, model, features, problem)

    def beside(self, spec: ModelSpec, spine: pa.Table) -> Production:
        """The same; not to be compared with if it takes inputs that a spine doesn't have."""
        lacking = [name for name in request_types(self.features) if name not in {*spec.inputs, *spine.column_names}]
        if not lacking:
            return self
        return replace(self, features=(), problem=f"it takes {', '.join(lacking)}, which the spine doesn't have")

    def scores(self, training_set: TrainingSet) -> FloatArray | None:
        """Its scores of the validation rows, shape ``(n,)``; None if it can't be compared."""
        if self.problem:
            return None
        matrix = training_set.matrix([ref.name for ref in self.features])
        return self.model.predict(matrix[training_set.is_validation])


# ── Judging ─────────────────────────────────────────────────────────────────────────


def _baseline(spec: ModelSpec, training_set: TrainingSet, rows: Rows, scores: FloatArray, column: int) -> Baseline:
    training, validation = training_set.training, training_set.validation
    feature = spec.feature_names[column]
    fitted = SingleFeatureBaseline.fit(feature, training.matrix[:, column], training.labels, objective=spec.objective)
    plain = fitted.score(validation.matrix[:, column])
    # A single feature ranks, it gives no probabilities: losses can't be compared.
    metric = spec.metric if spec.objective == "regression" or metric_named(spec.metric).larger_is_better else "auc"
    return Baseline(
        feature,
        metric,
        measure(metric, rows.labels, plain, clusters=rows.entities),
        gain(metric, rows.labels, scores, plain, clusters=rows.entities),
    )


def _latency_ms(model: LoadedModel, matrix: FloatArray) -> float:
    """Median of scoring one row."""
    taken = []
    for row in range(min(_LATENCY_ROWS, len(matrix))):
        begin = time.perf_counter()
        model.predict(matrix[row : row + 1])
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken)) * 1_000


# ── Shared ──────────────────────────────────────────────────────────────────────────


@contextmanager
def _scratch(workspace: Workspace) -> Iterator[str]:
    """A folder for what Tune and Train write about their own running; nobody needs it afterwards."""
    home = workspace.settings.home
    home.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="training-", dir=home)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin
