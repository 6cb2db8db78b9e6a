"""The catalogue of `heliostat.telemetry`, counted through Ray Serve's metrics: Prometheus reads them there."""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from typing import Any

from ray.serve import metrics

from heliostat.serving.answers import PredictAnswer
from heliostat.serving.breaker import State
from heliostat.telemetry import METRICS, Metric

_FLUSH_EVERY_S = 1.0
_STATES = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}
_LATENCY_BOUNDS_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000]


class ServeMeter:
    """Counts in a replica; the replica's name goes along as a tag.

    Counters are added up here and handed to Ray once a second: a count costs Ray ten times of what
    it costs a dictionary. To be used on one event loop.
    """

    def __init__(self) -> None:
        self._metrics = {metric.name: _made(metric) for metric in METRICS}
        self._labels = {metric.name: metric.labels for metric in METRICS}
        self._pending: Tally[tuple[str, ...]] = Tally()

    def answered(self, route: str, status: int, latency_ms: float) -> None:
        """Count a request."""
        self._count(1, "heliostat_requests_total", route, str(status))
        self._metrics["heliostat_request_latency_ms"].observe(latency_ms, {"route": route})

    def predicted(self, answer: PredictAnswer) -> None:
        """Count what it predicted."""
        model, rows = answer.model, answer.predictions
        for (version, variant, fallback), number in Tally(
            zip(rows.versions, rows.variants, rows.fallbacks, strict=True)
        ).items():
            self._count(number, "heliostat_predictions_total", model, str(version), variant)
            if fallback is not None:
                self._count(number, "heliostat_fallbacks_total", model, str(fallback))
        missing = sum(map(len, rows.missing))
        if missing:
            self._count(missing, "heliostat_missing_features_total", model)

    def breaker(self, dependency: str, state: State) -> None:
        """Note the state of a circuit breaker."""
        self._metrics["heliostat_breaker_state"].set(_STATES[state], {"dependency": dependency})

    def took_in(self, source: str, outcome: str, events: int) -> None:
        """Count events."""
        self._count(events, "heliostat_events_total", source, outcome)

    def _count(self, number: int, *key: str) -> None:
        if not self._pending:
            asyncio.get_running_loop().call_later(_FLUSH_EVERY_S, self._flush)
        self._pending[key] += number

    def _flush(self) -> None:
        pending, self._pending = self._pending, Tally()
        for (name, *values), number in pending.items():
            self._metrics[name].inc(number, dict(zip(self._labels[name], values, strict=True)))


def _made(metric: Metric) -> Any:  # noqa: ANN401 - Ray's metrics share no type
    about = f"{metric.meaning} ({metric.unit})"
    if metric.kind == "histogram":
        return metrics.Histogram(
            metric.name, description=about, boundaries=_LATENCY_BOUNDS_MS, tag_keys=metric.labels
        )
    kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
    return kind(metric.name, description=about, tag_keys=metric.labels)
