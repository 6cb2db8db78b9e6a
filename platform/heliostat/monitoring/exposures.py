"""A split's exposures and what became of them: the prediction log joined with labels, and analysed.

An exposure is a prediction that the assigned version itself gave while the split was running; its
outcome is the model's label, once the horizon has passed. The covariate is what the control
would have said at the exposure: computed for both arms from the logged vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.clock import format_instant
from heliostat.errors import ExperimentDataError
from heliostat.experiments.analysis import Analysis, aggregate, analyze
from heliostat.experiments.assignment import RoutingDocument
from heliostat.models.definitions import ModelSpec
from heliostat.models.labels import labels_from_log
from heliostat.monitoring.performance import watermark_us
from heliostat.monitoring.served import VECTORS, ServedRows, read_served
from heliostat.settings import Settings
from heliostat.storage.catalog_tables import RouteRow
from heliostat.workspace import Workspace

FloatArray = NDArray[np.float64]

VERDICT_KIND = "experiment"
"""How an analysis is filed among the catalog's verdicts."""


@dataclass(frozen=True, slots=True)
class Split:
    """A split that ran or is running.

    Attributes:
        route: Its newest routing document.
        revisions: All revisions of it: it may have been widened.
        from_us: When it started.
        until_us: When it ended, exclusive; None: it is running.
    """

    route: RoutingDocument
    revisions: tuple[int, ...]
    from_us: int
    until_us: int | None


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What a split has shown.

    Attributes:
        split: Which one.
        label: The label that is the outcome.
        at_us: When it was looked at.
        n_exposures: Predictions that are exposures.
        analyses: The control against each other variant.
    """

    split: Split
    label: str
    at_us: int
    n_exposures: int
    analyses: tuple[Analysis, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON carries it."""
        return {
            "model": self.split.route.model,
            "experiment": self.split.route.salt,
            "from_us": self.split.from_us,
            "until_us": self.split.until_us,
            "at_us": self.at_us,
            "outcome": self.label,
            "n_exposures": self.n_exposures,
            "analyses": [each.to_dict() for each in self.analyses],
        }

    def lines(self) -> list[str]:
        """A report for people."""
        ended = "running" if self.split.until_us is None else f"ended {format_instant(self.split.until_us)}"
        since = f"since {format_instant(self.split.from_us)}, {ended}"
        shown = f"{self.n_exposures:,} exposures, outcome {self.label!r}"
        lines = [f"experiment {self.split.route.salt}: {since}; {shown}"]
        for each in self.analyses:
            lines += _analysis_lines(each)
        return lines


def _analysis_lines(found: Analysis) -> list[str]:
    split = found.split
    counts = ", ".join(f"{name} {count:,}" for name, count in split.observed.items())
    lines = [
        f"  {found.treatment} against {found.control}: {found.conclusion.upper()}",
        f"    entities     {counts} (sample-ratio p = {split.p_value:.3g}"
        + (": MISMATCH, nothing may be concluded)" if split.mismatch else ")"),
        f"    outcomes     {sum(found.with_outcome.values()):,} known, over {found.days:.1f} days of exposures",
    ]
    if found.crossed:
        lines.append(f"    crossed      {found.crossed:,} entities met several variants; they count for their first")
    for name, effect, interval in (
        ("difference", found.effect, found.interval),
        ("with CUPED", found.adjusted, found.adjusted_interval),
        ("one look", found.effect, found.one_look),
    ):
        if effect is not None and interval is not None:
            told = f"{effect.difference:+.4f} [{interval.lower:+.4f}, {interval.upper:+.4f}]"
            lines.append(
                f"    {name:<12} {told}  p = {interval.p_value:.3g}  ({interval.kind}, {1 - interval.alpha:.0%})"
            )
    return lines


def analyze_split(
    workspace: Workspace,
    settings: Settings,
    *,
    model: str | None = None,
    experiment: str | None = None,
    planned_entities: int | None = None,
) -> SplitReport:
    """Analyse a model's split.

    Args:
        workspace: The stores and the declarations.
        settings: Says what evidence is needed.
        model: The model's name; None: the only one that is declared.
        experiment: The split's name; None: the newest one.
        planned_entities: Entities in both arms at which the interval is tightest; None: twice the fewest that
            an arm needs.

    Raises:
        UnknownModelError: If the model isn't declared.
        ExperimentDataError: If there is no such split.
    """
    spec = workspace.definitions.model(model)
    with workspace.catalog.read() as rows:
        split = find_split(spec.name, rows.route_history(spec.name), experiment)
    route = split.route
    now_us = workspace.clock.now_us()
    served = read_served(
        workspace.offline_store,
        spec,
        from_us=split.from_us,
        until_us=now_us + 1 if split.until_us is None else split.until_us,
    )
    exposures = _exposures(served, split)
    units = aggregate(
        np.asarray(exposures.table.column("entity").to_pylist(), dtype=np.str_),
        exposures.variants,
        exposures.at_us,
        _outcomes(workspace, spec, exposures, now_us=now_us, lateness_us=settings.ingestion.lateness_us),
        _control_scores(workspace, route, exposures),
    )
    evidence = settings.experiments
    analyses = tuple(
        analyze(
            units,
            weights={variant.name: variant.weight for variant in route.variants},
            control=route.control.name,
            treatment=variant.name,
            alpha=evidence.alpha,
            tuned_at=planned_entities or 2 * evidence.min_exposures,
            minimum_entities=evidence.min_exposures,
            minimum_days=evidence.min_days,
            srm_alpha=evidence.srm_alpha,
        )
        for variant in route.variants[1:]
        if variant.weight > 0
    )
    return SplitReport(split, spec.label.name, now_us, len(exposures), analyses)


def record_report(workspace: Workspace, report: SplitReport) -> int:
    """Keep a report among the catalog's verdicts; gives its number."""
    route = report.split.route
    with workspace.catalog.write() as rows:
        return rows.add_verdict(
            route.model, route.variants[-1].version, VERDICT_KIND, report.to_dict(), at_us=report.at_us
        )


def find_split(model: str, history: tuple[RouteRow, ...], experiment: str | None) -> Split:
    """Find a split in a model's routes.

    Args:
        model: The model's name.
        history: All of its routes, oldest first.
        experiment: The split's name; None: the newest one.

    Raises:
        ExperimentDataError: If there is none, naming those that ran.
    """
    routes = [(row, RoutingDocument.from_document(row.document)) for row in history]
    salts = list(dict.fromkeys(route.salt for _, route in routes if route.is_split))
    wanted = f"{model}/{experiment}" if experiment is not None else (salts[-1] if salts else None)
    if wanted not in salts:
        names = ", ".join(salt.removeprefix(f"{model}/") for salt in salts) or "none"
        raise ExperimentDataError(
            f"model {model!r} has no split {experiment!r}" if experiment else f"model {model!r} has had no split",
            f"splits so far: {names}",
        )
    places = [place for place, (_, route) in enumerate(routes) if route.salt == wanted]
    after = routes[places[-1] + 1 :]
    return Split(
        route=routes[places[-1]][1],
        revisions=tuple(routes[place][1].revision for place in places),
        from_us=routes[places[0]][0].at_us,
        until_us=after[0][0].at_us if after else None,
    )


def _exposures(served: ServedRows, split: Split) -> ServedRows:
    """Predictions that an assigned version itself gave under this split."""
    table = served.table
    versions: Mapping[str, int] = {variant.name: variant.version for variant in split.route.variants}
    meant = pc.index_in(table.column("variant"), pa.array(list(versions)))
    version = pa.array(list(versions.values()), pa.int64()).take(meant.combine_chunks())
    chosen = pc.and_(
        pc.is_in(table.column("revision"), pa.array(split.revisions, table.schema.field("revision").type)),
        pc.and_(pc.equal(table.column("source"), "model"), pc.equal(table.column("version"), version)),
    )
    return ServedRows(table.filter(pc.fill_null(chosen, False)), served.entity)


def _outcomes(
    workspace: Workspace, spec: ModelSpec, exposures: ServedRows, *, now_us: int, lateness_us: int
) -> FloatArray:
    """Labels, NaN where the horizon hasn't passed; shape ``(n,)``."""
    at_us = exposures.at_us
    complete_us = watermark_us(workspace.event_log, spec, now_us=now_us, lateness_us=lateness_us)
    due = at_us + spec.label.horizon_us <= complete_us
    outcomes = np.full(len(exposures), np.nan)
    if due.any():
        labels_of = labels_from_log(workspace.event_log, spec.label, spec.entity)
        outcomes[due] = labels_of(exposures.keys.filter(pa.array(due)), at_us[due])
    return outcomes


def _control_scores(workspace: Workspace, route: RoutingDocument, exposures: ServedRows) -> FloatArray:
    """What the control says to each logged vector, shape ``(n,)``; NaN if the arms see different features."""
    registry = workspace.models
    names = registry.get(route.model, route.control.version).signature.names
    if any(registry.get(route.model, variant.version).signature.names != names for variant in route.variants):
        return np.full(len(exposures), np.nan)
    lengths = pc.list_value_length(exposures.table.column(VECTORS))
    whole = pc.fill_null(pc.equal(lengths, len(names)), False).to_numpy().astype(np.bool_)
    scores = np.full(len(exposures), np.nan)
    complete = exposures.with_vectors(len(names))
    scores[whole] = registry.load(route.model, route.control.version).predict(complete.matrix(len(names)))
    return scores
