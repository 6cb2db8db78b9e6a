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
        bounds: A histogram's upper bounds.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    labels: tuple[str, ...]
    meaning: str
    bounds: tuple[float, ...] = ()


_REQUEST_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000)
_STAGE_MS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1_000)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024, 2_048)


def _counter(name: str, unit: str, labels: tuple[str, ...], meaning: str) -> Metric:
    return Metric(name, "counter", unit, labels, meaning)


def _gauge(name: str, unit: str, labels: tuple[str, ...], meaning: str) -> Metric:
    return Metric(name, "gauge", unit, labels, meaning)


def _stage(stage: str, meaning: str) -> Metric:
    return Metric(f"heliostat_{stage}_latency_ms", "histogram", "ms", ("model",), meaning, _STAGE_MS)


METRICS: tuple[Metric, ...] = (
    _counter("heliostat_requests_total", "requests", ("route", "status"), "Requests answered"),
    Metric("heliostat_request_latency_ms", "histogram", "ms", ("route",), "Time in the gateway", _REQUEST_MS),
    _gauge("heliostat_requests_in_flight", "requests", (), "Requests that are being answered"),
    # One name a stage: what reads these numbers from Ray keeps 2,000 label sets of a name.
    _stage("parse", "Of a prediction request: reading its body"),
    _stage("wait", "Of a prediction request: waiting for its batch to begin"),
    _stage("lookup", "Of a prediction request: its batch's features"),
    _stage("route", "Of a prediction request: its batch's variants"),
    _stage("predict", "Of a prediction request: its batch's scores"),
    _stage("log", "Of a prediction request: its batch's entry in the prediction log, and explanations"),
    _gauge("heliostat_queue_waiting", "requests", ("queue",), "Requests that wait for a batch"),
    _gauge("heliostat_queue_calls_in_flight", "calls", ("queue",), "Batches under way"),
    Metric("heliostat_batch_requests", "histogram", "requests", ("queue",), "Requests in a batch", _SIZES),
    Metric("heliostat_batch_rows", "histogram", "rows", ("queue",), "Entities or events in a batch", _SIZES),
    _counter("heliostat_predictions_total", "entities", ("model", "version", "variant"), "Predictions"),
    _counter("heliostat_fallbacks_total", "entities", ("model", "rung", "cause"), "Answers by a fallback"),
    _counter("heliostat_unlogged_predictions_total", "entities", ("model",), "Answered before they were logged"),
    _counter(
        "heliostat_missing_features_total",
        "entities",
        ("model", "feature"),
        "Features without a value in a prediction",
    ),
    _counter("heliostat_cache_total", "look-ups", ("cache", "outcome"), "What a cache had (hit), or hadn't (miss)"),
    _gauge("heliostat_models_loaded", "versions", (), "Model versions that this replica holds"),
    _gauge("heliostat_model_memory_bytes", "bytes", (), "Memory that the loaded versions take, about"),
    _gauge("heliostat_routing_revision", "revision", ("model",), "The routing document that serves"),
    _gauge("heliostat_serving_version", "version", ("model",), "The control's version in that document"),
    _gauge(
        "heliostat_breaker_state", "0 closed, 1 half-open, 2 open", ("dependency",), "Whether a dependency is asked"
    ),
    _gauge("heliostat_log_buffer_rows", "rows", (), "Predictions that are in memory only"),
    _gauge("heliostat_stream_entries", "entries", ("stream",), "Entries that wait for the sink"),
    _gauge("heliostat_stream_age_seconds", "s", ("stream",), "How long the oldest of them has waited"),
    _counter("heliostat_events_total", "events", ("source", "outcome"), "Events taken in"),
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
