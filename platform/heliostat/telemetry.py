"""Logging, and the catalogue of metrics.

Names in `METRICS` are the only ones that the product exports; the deployments publish them
through Ray Serve's metrics, and Prometheus shows them with Ray's prefix: ``ray_heliostat_…``.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from typing import Literal

from heliostat.settings import TelemetrySettings
from heliostat.tracing import CURRENT


@dataclass(frozen=True)
class Metric:
    """One exported metric.

    Attributes:
        name: As declared; Prometheus shows it behind ``ray_``.
        kind: Counter, gauge or histogram.
        unit: Of its values.
        labels: Tag keys.
        meaning: One line.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    labels: tuple[str, ...]
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric("heliostat_requests_total", "counter", "requests", ("route", "status"), "Requests answered"),
    Metric("heliostat_request_latency_ms", "histogram", "ms", ("route",), "Time in the gateway"),
    Metric("heliostat_predictions_total", "counter", "entities", ("model", "version", "variant"), "Predictions"),
    Metric("heliostat_fallbacks_total", "counter", "entities", ("model", "reason"), "Answers by a fallback"),
    Metric(
        "heliostat_breaker_state", "gauge", "0 closed, 1 half-open, 2 open", ("dependency",), "Whether it is asked"
    ),
    Metric("heliostat_missing_features_total", "counter", "features", ("model",), "Features without a value"),
    Metric("heliostat_events_total", "counter", "events", ("source", "outcome"), "Events taken in"),
)


def configure_logging(settings: TelemetrySettings) -> None:
    """Send Heliostat's log records to standard error, as text or as one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if settings.format == "json" else _TextFormatter())
    logger = logging.getLogger("heliostat")
    logger.handlers = [handler]
    logger.setLevel(settings.level)
    logger.propagate = False


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s  %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        text, trace = super().formatMessage(record), CURRENT.get()
        return text if trace is None else f"{text} (trace {trace.trace_id})"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        document = {
            "at": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        trace = CURRENT.get()
        if trace is not None:
            document["trace_id"] = trace.trace_id
        if record.exc_info:
            document["error"] = self.formatException(record.exc_info)
        return json.dumps(document)
