"""The catalogue of `heliostat.telemetry`, counted through Ray Serve's metrics: Prometheus reads them there."""

from __future__ import annotations

from collections import Counter as Tally
from typing import Any

from ray.serve import metrics

from heliostat.serving.requests import PredictAnswer
from heliostat.telemetry import METRICS, Metric

_LATENCY_BOUNDS_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000]


class ServeMeter:
    """Counts in a replica; the replica's name goes along as a tag."""

    def __init__(self) -> None:
        self._metrics = {metric.name: _made(metric) for metric in METRICS}

    def answered(self, route: str, status: int, latency_ms: float) -> None:
        """Count a request."""
        self._metrics["heliostat_requests_total"].inc(1, {"route": route, "status": str(status)})
        self._metrics["heliostat_request_latency_ms"].observe(latency_ms, {"route": route})

    def predicted(self, answer: PredictAnswer) -> None:
        """Count what it predicted."""
        model = answer.model
        for (version, variant), number in Tally((each.version, each.variant) for each in answer.entities).items():
            tags = {"model": model, "version": str(version), "variant": variant}
            self._metrics["heliostat_predictions_total"].inc(number, tags)
        for reason, number in Tally(each.fallback for each in answer.entities if each.fallback).items():
            self._metrics["heliostat_fallbacks_total"].inc(number, {"model": model, "reason": str(reason)})
        missing = sum(len(each.missing) for each in answer.entities)
        if missing:
            self._metrics["heliostat_missing_features_total"].inc(missing, {"model": model})

    def took_in(self, source: str, outcome: str, events: int) -> None:
        """Count events."""
        if events:
            self._metrics["heliostat_events_total"].inc(events, {"source": source, "outcome": outcome})


def _made(metric: Metric) -> Any:  # noqa: ANN401 - Ray's metrics share no type
    about = f"{metric.meaning} ({metric.unit})"
    if metric.kind == "histogram":
        return metrics.Histogram(
            metric.name, description=about, boundaries=_LATENCY_BOUNDS_MS, tag_keys=metric.labels
        )
    kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
    return kind(metric.name, description=about, tag_keys=metric.labels)
