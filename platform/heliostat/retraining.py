"""When a model is trained again, and the way from there to serving.

`decide` looks at what is known and says whether a retraining is due, and why. It changes nothing.
`retrain` trains a candidate, and promotes it if the gate lets it through.

Realised loss and age decide. Drift ranks the causes; by itself it only asks for a look, unless
``retraining.on_drift`` says ``retrain``: inputs may move without a loss. A cool-down keeps a
noisy trigger, or a gate that keeps saying no, from training in circles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from heliostat.clock import US_PER_DAY, format_duration, format_instant, parse_duration_us
from heliostat.errors import GateFailedError, RolloutError
from heliostat.errors.base import reason_of
from heliostat.models.definitions import ModelSpec
from heliostat.monitoring.checks import run_checks
from heliostat.monitoring.performance import watermark_us
from heliostat.monitoring.verdict import Severity, Verdict, latest
from heliostat.settings import RetrainingSettings
from heliostat.workspace import Workspace

if TYPE_CHECKING:
    from heliostat.training.trainer import TrainingReport

DUE_EXIT_CODE: Final = 20
"""A job's exit code when a retraining is due and it was only asked to decide."""

RUN_KIND: Final = "retrain"
"""How a retraining is filed among the catalog's runs."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that speaks for a retraining.

    Attributes:
        trigger: ``nothing serves``, ``age``, ``performance`` or ``drift``.
        wants: ``retrain``, or ``look``: somebody should find out what happened.
        message: One sentence with the figures.
        evidence: The figures, as JSON carries them.
    """

    trigger: Literal["nothing serves", "age", "performance", "drift"]
    wants: Literal["retrain", "look"]
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class State:
    """What a decision rests on.

    Attributes:
        model: The model's name.
        version: The production version; None: nothing serves.
        trained_us: When it was registered, microseconds since the epoch.
        last_attempt_us: When any version was last registered, or a retraining last begun.
        performance: The newest performance verdict on the production version.
        drift: The newest drift verdict on it.
    """

    model: str
    version: int | None
    trained_us: int | None
    last_attempt_us: int | None
    performance: Verdict | None = None
    drift: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a retraining is due, and why.

    Attributes:
        model: The model's name.
        version: The production version; None: nothing serves.
        at_us: When it was decided.
        due: Whether to train now.
        reasons: All that speaks for it, also what is held back or only wants a look.
        held_until_us: The end of the cool-down, if that is what holds it back.
        unknown: What couldn't be judged, such as a check that never ran.
    """

    model: str
    version: int | None
    at_us: int
    due: bool
    reasons: tuple[Reason, ...]
    held_until_us: int | None = None
    unknown: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0, or `DUE_EXIT_CODE`."""
        return DUE_EXIT_CODE if self.due else 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON carries it; `from_dict` reads it back."""
        return {**asdict(self), "reasons": [asdict(reason) for reason in self.reasons], "unknown": list(self.unknown)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Decision:
        """The reverse of `to_dict`."""
        reasons = tuple(Reason(**reason) for reason in document["reasons"])
        return cls(**{**document, "reasons": reasons, "unknown": tuple(document["unknown"])})

    def lines(self) -> list[str]:
        """A report for people."""
        serves = "nothing serves" if self.version is None else f"version {self.version} serves"
        said = "due" if self.due else "not due"
        if self.held_until_us is not None:
            said = f"held back by the cool-down until {format_instant(self.held_until_us)}"
        lines = [f"retraining of {self.model}: {said} ({serves}, {format_instant(self.at_us)})"]
        lines += [f"  {reason.wants:<8} {reason.trigger}: {reason.message}" for reason in self.reasons]
        lines += [f"  unknown  {each}" for each in self.unknown]
        return lines


# ── The decision ────────────────────────────────────────────────────────────────────


def decide(state: State, policy: RetrainingSettings, *, now_us: int) -> Decision:
    """Apply a policy to what is known. Pure.

    Args:
        state: What is known.
        policy: Triggers, each off when null, and the cool-down.
        now_us: The present, microseconds since the epoch.
    """
    if state.version is None:
        reasons = [Reason("nothing serves", "retrain", "no version is in production")]
        unknown: list[str] = []
    else:
        found = [_by_age(state, policy, now_us), _by_performance(state, policy), _by_drift(state, policy)]
        reasons = [each for each in found if isinstance(each, Reason)]
        unknown = [each for each in found if isinstance(each, str)]
    wanted = any(reason.wants == "retrain" for reason in reasons)
    held_until_us = None
    if wanted and state.last_attempt_us is not None:
        cool_us = state.last_attempt_us + parse_duration_us(policy.cooldown)
        held_until_us = cool_us if now_us < cool_us else None
    return Decision(
        model=state.model,
        version=state.version,
        at_us=now_us,
        due=wanted and held_until_us is None,
        reasons=tuple(reasons),
        held_until_us=held_until_us,
        unknown=tuple(unknown),
    )


def _by_age(state: State, policy: RetrainingSettings, now_us: int) -> Reason | None:
    if policy.max_age is None or state.trained_us is None:
        return None
    age_us, limit_us = now_us - state.trained_us, parse_duration_us(policy.max_age)
    if age_us <= limit_us:
        return None
    message = f"it is {age_us / US_PER_DAY:.1f} days old; at most {format_duration(limit_us)} is allowed"
    return Reason("age", "retrain", message, {"age_us": age_us, "max_age_us": limit_us})


def _by_performance(state: State, policy: RetrainingSettings) -> Reason | str | None:
    if policy.min_performance_ratio is None:
        return None
    if state.performance is None:
        return "performance: no check has run on this version"
    finding = next((each for each in state.performance.findings if each.evidence.get("ratio") is not None), None)
    if finding is None:
        told = state.performance.findings[0].message if state.performance.findings else "nothing was found"
        return f"performance: {told}"
    ratio, evidence = float(finding.evidence["ratio"]), dict(finding.evidence)
    if ratio >= policy.min_performance_ratio:
        return None
    sure = "the interval agrees" if finding.severity is Severity.ALARM else "the interval still covers no change"
    message = f"{finding.subject} is at {ratio:.1%} of what it was, below {policy.min_performance_ratio:.0%}; {sure}"
    return Reason("performance", "retrain", message, evidence)


def _by_drift(state: State, policy: RetrainingSettings) -> Reason | str | None:
    if policy.on_drift == "ignore":
        return None
    if state.drift is None:
        return "drift: no check has run on this version"
    if state.drift.status is Severity.INSUFFICIENT:
        return f"drift: {state.drift.findings[0].message if state.drift.findings else 'nothing was found'}"
    moved = [each for each in state.drift.findings if each.severity is Severity.ALARM]
    if not moved:
        return None
    ranked = sorted(moved, key=lambda each: -float(each.evidence.get("js_distance") or 0.0))
    named = ", ".join(each.subject for each in ranked[:3]) + (", …" if len(ranked) > 3 else "")
    message = f"{len(ranked)} of {len(state.drift.findings)} have moved, the most {named}"
    return Reason("drift", policy.on_drift, message, {"moved": [each.subject for each in ranked]})


def state_of(workspace: Workspace, model: str) -> State:
    """What is known about a model now: from the registry, the verdicts and the runs.

    Raises:
        CatalogUnavailableError: If the catalog doesn't answer.
    """
    catalog = workspace.catalog
    with catalog.read() as rows:
        versions = {row.version: row for row in rows.versions(model)}
        production = rows.alias(model, "production")
        attempts = [row.created_us for row in versions.values()]
        attempts += [run.started_us for run in rows.runs(RUN_KIND) if run.subject == model]
    last_attempt_us = max(attempts, default=None)
    if production is None:
        return State(model, None, None, last_attempt_us)
    return State(
        model,
        production.version,
        versions[production.version].created_us,
        last_attempt_us,
        performance=latest(catalog, model, "performance", version=production.version),
        drift=latest(catalog, model, "drift", version=production.version),
    )


# ── Doing it ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Retraining:
    """What a retraining did.

    Attributes:
        decision: Why it was done.
        outcome: ``promoted``: the candidate serves; ``challenger``: it serves a share, in a split;
            ``refused``: the gate said no, and everything is as it was.
        training: What the training did.
    """

    decision: Decision
    outcome: Literal["promoted", "challenger", "refused"]
    training: TrainingReport

    @property
    def exit_code(self) -> int:
        """0, or that of a refusal."""
        return GateFailedError.exit_code if self.outcome == "refused" else 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON carries it."""
        return {
            "decision": self.decision.to_dict(),
            "outcome": self.outcome,
            "training": self.training.as_dict(),
        }

    def lines(self) -> list[str]:
        """A report for people."""
        told = {
            "promoted": "it serves now",
            "challenger": "it serves a share, until the split is decided",
            "refused": "nothing has changed: the gate refused it",
        }
        return [*self.decision.lines(), *self.training.lines(), told[self.outcome]]


def retrain(
    workspace: Workspace,
    decision: Decision,
    *,
    challenger_weight: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Retraining:
    """Train a candidate on the newest labels, and let it serve if the gate lets it through.

    Ray must be connected. The first training takes the settings' instants; later ones validate at the latest
    instant whose labels are known and learn from those before it: the same instants again would
    give the same model again. The run is kept in the catalog, also if it fails.

    If the gate asks for parity, what production was served lately is looked at first: run the sink before.

    Args:
        workspace: The stores and the declarations.
        decision: Why; kept as evidence. Whether it is due is the caller's to look at.
        challenger_weight: Instead of promoting it, let the candidate serve this share in a split.
        progress: Told what happens next.

    Raises:
        RolloutError: If a split is running: its arms must stay what they are.
        TrainingDataError: If instants or rows don't allow it.
        TrainingFailedError: If the search or the fit breaks down.
        PromotionConflictError: If somebody else has moved the alias meanwhile.
    """
    model = decision.model
    route = workspace.rollout.current(model)
    if route is not None and route.is_split:
        raise RolloutError(model, "retrain", f"split {route.salt!r} is running", "stop it first: its arms must stay")
    catalog, clock = workspace.catalog, workspace.clock
    if workspace.definitions.model(model).gate.max_parity_mismatch is not None and decision.version is not None:
        run_checks(workspace, workspace.settings, ["parity"], model=model, version=decision.version)
    with catalog.write() as rows:
        run = rows.start_run(RUN_KIND, model, started_us=clock.now_us())
    try:
        done = _retrain(workspace, decision, challenger_weight, progress)
    except BaseException as error:
        with catalog.write() as rows:
            report = {"decision": decision.to_dict(), "error": reason_of(error)}
            rows.finish_run(run, "failed", report, finished_us=clock.now_us())
        raise
    with catalog.write() as rows:
        rows.finish_run(run, done.outcome, done.to_dict(), finished_us=clock.now_us())
    return done


def _retrain(
    workspace: Workspace,
    decision: Decision,
    challenger_weight: float | None,
    progress: Callable[[str], None] | None,
) -> Retraining:
    # Here, because it brings Ray along: a decision alone shouldn't wait for that.
    from heliostat.training.trainer import train

    spec = workspace.definitions.model(decision.model)
    reason = "; ".join(f"{each.trigger}: {each.message}" for each in decision.reasons) or "asked for"
    serving = decision.version
    as_challenger = challenger_weight is not None and serving is not None
    trained = train(
        workspace,
        spec,
        validation_us=() if serving is None else (_newest_labels_us(workspace, spec),),
        promote=not as_challenger,
        reason=reason,
        progress=progress,
    )
    if not trained.gate.passed:
        return Retraining(decision, "refused", trained)
    if challenger_weight is not None and serving is not None:
        workspace.rollout.start_split(
            spec.name,
            experiment=f"version-{trained.version}",
            control=serving,
            challenger=trained.version,
            weight=challenger_weight,
            reason=reason,
        )
        return Retraining(decision, "challenger", trained)
    workspace.rollout.serve(spec.name, trained.version, reason=reason)
    return Retraining(decision, "promoted", trained)


def _newest_labels_us(workspace: Workspace, spec: ModelSpec) -> int:
    """The start of the latest day whose labels are complete."""
    complete_us = watermark_us(
        workspace.event_log,
        spec,
        now_us=workspace.clock.now_us(),
        lateness_us=workspace.settings.ingestion.lateness_us,
    )
    return (complete_us - spec.label.horizon_us) // US_PER_DAY * US_PER_DAY
