"""The checks of one model version: read what was served, judge it, keep the verdict.

Plain Python over the stores, no Ray: a check reads a window of the prediction log, and of the
event log only the buckets it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from heliostat.clock import parse_duration_us
from heliostat.errors import MonitoringDataError, StaleVersionError
from heliostat.features.definitions import request_types
from heliostat.models.definitions import ModelSpec
from heliostat.models.estimates import Estimate
from heliostat.models.labels import labels_from_log
from heliostat.models.profile import Profile
from heliostat.models.registry import PRODUCTION, ModelVersion, Selector
from heliostat.models.rows import model_sources, version_features
from heliostat.monitoring.drift import DriftPolicy, drift_findings
from heliostat.monitoring.parity import Served, compare, given_rows, parity_findings, recompute_from_log
from heliostat.monitoring.performance import mature, performance_finding, watermark_us
from heliostat.monitoring.quality import QualityPolicy, freshness_finding, profile_findings
from heliostat.monitoring.served import ServedRows, read_served, reported_labels
from heliostat.monitoring.verdict import CHECKS, Finding, Severity, Verdict, record
from heliostat.settings import Settings
from heliostat.storage.event_log import EventLog
from heliostat.workspace import Workspace


def run_checks(
    workspace: Workspace,
    settings: Settings,
    checks: Sequence[str],
    *,
    model: str | None = None,
    version: Selector = PRODUCTION,
    until_us: int | None = None,
    window_us: int | None = None,
) -> tuple[Verdict, ...]:
    """Run checks on a version and keep their verdicts in the catalog.

    Args:
        workspace: The stores and the declarations.
        settings: Says when something is worth an alarm.
        checks: Of `CHECKS`, each once.
        model: The model's name; None: the only one that is declared.
        version: A number, an alias, or ``latest``.
        until_us: Where the stretch looked at ends, exclusive; None: now.
        window_us: How far it reaches back; None: as the settings say.

    Raises:
        UnknownModelError: If the model isn't declared, or has no version.
        UnknownAliasError: If nothing is in production and no version was named.
        MonitoringDataError: If a check is unknown, or the version has no reference profile.
    """
    for check in checks:
        if check not in CHECKS:
            raise MonitoringDataError(f"check {check!r}", "it is unknown", f"use one of {', '.join(CHECKS)}")
    spec = workspace.definitions.model(model)
    monitor = Monitor(
        workspace, settings, spec, workspace.models.get(spec.name, version), until_us=until_us, window_us=window_us
    )
    verdicts = tuple(monitor.run(check) for check in dict.fromkeys(checks))
    for verdict in verdicts:
        record(workspace.catalog, verdict)
    return verdicts


class Monitor:
    """Looks at one version over one stretch of time. Changes nothing.

    Args:
        workspace: The stores.
        settings: Says when something is worth an alarm.
        spec: The model's declaration.
        version: The version looked at.
        until_us: Where the stretch ends, exclusive; None: now.
        window_us: How far it reaches back; None: as the settings say.
    """

    def __init__(
        self,
        workspace: Workspace,
        settings: Settings,
        spec: ModelSpec,
        version: ModelVersion,
        *,
        until_us: int | None = None,
        window_us: int | None = None,
    ) -> None:
        self._workspace, self._spec, self._version = workspace, spec, version
        self._settings, self._ingestion = settings.monitoring, settings.ingestion
        self._now_us = workspace.clock.now_us()
        self._until_us = self._now_us if until_us is None else until_us
        self._from_us = self._until_us - (
            parse_duration_us(self._settings.window) if window_us is None else window_us
        )

    def run(self, check: str) -> Verdict:
        """One check of `CHECKS`, by name."""
        checks = {
            "drift": self.drift,
            "performance": self.performance,
            "quality": self.quality,
            "parity": self.parity,
        }
        return checks[check]()

    def drift(self) -> Verdict:
        """Whether features and predictions look like those of the training rows; one row an entity."""
        rows = self._rows.newest_each()
        policy = DriftPolicy(
            js_floor=self._settings.drift_js_floor,
            psi_floor=self._settings.drift_psi_floor,
            alpha=self._settings.drift_alpha,
            min_rows=self._settings.min_rows,
        )
        findings = drift_findings(self._reference.counts(), self._counted(rows).counts(), policy)
        return self._verdict("drift", len(rows), findings)

    def quality(self) -> Verdict:
        """Whether events still come, and whether features are null or far off more often than in training."""
        rows = self._rows.newest_each()
        policy = QualityPolicy(
            max_null_increase=self._settings.max_null_rate_increase,
            max_outlier_increase=self._settings.max_outlier_increase,
            alpha=self._settings.drift_alpha,
            min_rows=self._settings.min_rows,
        )
        fresh = [
            freshness_finding(
                f"source {source.name}",
                self._log.statistics(source, self._spec.entity).max_time_us,
                now_us=self._now_us,
                max_age_us=parse_duration_us(self._settings.max_feature_age),
                future_tolerance_us=self._ingestion.future_tolerance_us,
            )
            for source in model_sources(self._spec)
        ]
        rates = profile_findings(self._reference, self._counted(rows), policy)
        return self._verdict("quality", len(rows), (*fresh, *rates))

    def performance(self) -> Verdict:
        """How good the predictions turned out whose label's horizon has passed.

        It looks back a window and a horizon: of the last days no label is known yet.
        """
        label = self._spec.label
        from_us = self._from_us - label.horizon_us
        rows = self._read(from_us, vectors=False)
        reported = reported_labels(self._workspace.offline_store, self._spec, rows, now_us=self._now_us)
        lateness_us = self._ingestion.lateness_us
        matured = mature(
            rows.keys,
            rows.at_us,
            rows.scores,
            labels_from_log(self._log, label, self._spec.entity),
            horizon_us=label.horizon_us,
            complete_until_us=watermark_us(self._log, self._spec, now_us=self._now_us, lateness_us=lateness_us),
            reported=reported,
        )
        finding = performance_finding(
            matured, self._spec.metric, self._trained_metric(), min_rows=self._settings.min_rows
        )
        return self._verdict("performance", len(rows), (finding,), from_us=from_us)

    def parity(self) -> Verdict:
        """Whether sampled vectors are what the event log gives for the same instants.

        Events that are still in the streams aren't in the log: run the sink first.
        """
        try:
            features = version_features(self._version, self._workspace.definitions.views)
        except StaleVersionError as error:
            message = f"{', '.join(error.views)} changed since version {self._version.version} was trained"
            return self._verdict("parity", 0, (Finding("views", Severity.INSUFFICIENT, message),))
        policy = self._settings.parity
        rows = self._rows.sample(policy.sample)
        names = self._version.signature.names
        matrix = rows.matrix(len(names))
        inputs, brought = rows.brought(list(request_types(features)))
        served = Served(
            rows.keys,
            rows.at_us,
            {name: matrix[:, place] for place, name in enumerate(names)},
            rows.ids,
            given_rows(rows.given, list({ref.view.ref: ref.view for ref in features}.values()), brought=brought),
            inputs,
        )
        compared = compare(served, recompute_from_log(self._log, features), tolerance=policy.tolerance)
        findings = parity_findings(compared, max_mismatch_share=policy.max_mismatch_share)
        return self._verdict("parity", len(rows), findings)

    # ── What they share ──────────────────────────────────────────────────────────

    @property
    def _log(self) -> EventLog:
        return self._workspace.event_log

    @cached_property
    def _rows(self) -> ServedRows:
        return self._read(self._from_us).with_vectors(len(self._version.signature.names))

    def _read(self, from_us: int, *, vectors: bool = True) -> ServedRows:
        store = self._workspace.offline_store
        # What is served in this very microsecond belongs to now.
        until_us = self._until_us + (self._until_us == self._now_us)
        rows = read_served(store, self._spec, from_us=from_us, until_us=until_us, vectors=vectors)
        return rows.of_version(self._version.version)

    @cached_property
    def _reference(self) -> Profile:
        document = self._workspace.models.package(self._spec.name, self._version.version).profile
        if document is None:
            raise MonitoringDataError(
                "drift",
                f"version {self._version.version} of {self._spec.name!r} has no reference profile",
                "train it again with this release",
            )
        return Profile.from_document(document)

    def _counted(self, rows: ServedRows) -> Profile:
        reference = self._reference
        scores = None if reference.prediction is None else rows.scores
        return reference.count(rows.matrix(len(reference.names)), scores)

    def _trained_metric(self) -> Estimate | None:
        found = self._version.metrics.get("metrics", {}).get(self._spec.metric)
        return None if found is None else Estimate(found["value"], found["low"], found["high"], found["n"])

    def _verdict(
        self, check: str, n_rows: int, findings: tuple[Finding, ...], *, from_us: int | None = None
    ) -> Verdict:
        return Verdict(
            check=check,
            model=self._spec.name,
            version=self._version.version,
            at_us=self._now_us,
            from_us=self._from_us if from_us is None else from_us,
            until_us=self._until_us,
            n_rows=n_rows,
            findings=findings,
        )
