"""What a replica counted, handed to Ray's metrics every few seconds: Prometheus reads it there.

Everything is a gauge to Ray, set to the number as it stands, also counters and the parts of histograms. To
Prometheus a number that never falls is a counter, whatever its type is called; and

- Ray's own histograms lose values: its agent knows what fell into a bucket and adds that bucket's middle to the
  sum, one Python call a value. These sums are exact, and cost the agent nothing that grows with the traffic;
- a gauge is known at 0 before it first rises (Ray's counters can't be), so that the first rise is seen;
- Ray forgets gauges that aren't set any more: a replica's end ends its series, instead of leaving them behind.
"""

from __future__ import annotations

import asyncio
import logging

from ray import serve
from ray._raylet import Config  # type: ignore[attr-defined] # compiled, without types
from ray.util.metrics import Gauge

from heliostat.serving.telemetry import Board, Sample
from heliostat.telemetry import METRICS, Metric

_logger = logging.getLogger("heliostat.gateway")

_LEAST_S = 1.0


class Exporter:
    """Hands a replica's numbers to Ray; the replica's name goes along as a label.

    Args:
        board: What was counted.
    """

    def __init__(self, board: Board) -> None:
        self._board, self._started = board, False
        # Twice as often as Ray passes them on; it takes 20 ms of the replica's loop.
        self._every_s = max(_LEAST_S, Config.metrics_report_interval_ms() / 2e3)
        context = serve.get_replica_context()
        self._tags = {
            "deployment": context.deployment,
            "replica": context.replica_tag,
            "application": context.app_name,
        }
        self._labels: dict[str, tuple[str, ...]] = {}
        self._gauges: dict[str, Gauge] = {}
        for metric in METRICS:
            for name, labels in _series(metric):
                self._labels[name] = labels
                about = f"{metric.meaning} ({metric.unit})"
                self._gauges[name] = Gauge(name, about, (*self._tags, *labels))
        self._tagged: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}

    def start(self) -> None:
        """Begin, if that wasn't done, on the running event loop; goes on as long as that does."""
        if not self._started:
            self._started = True
            self._export(asyncio.get_running_loop())

    def _export(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            for sample in self._board.samples():
                self._gauges[sample.name].set(sample.value, self._tags_of(sample))
        except Exception:  # whatever it is, the replica answers, and the next time may be better
            _logger.exception("metrics can't be handed to Ray")
        loop.call_later(self._every_s, self._export, loop)

    def _tags_of(self, sample: Sample) -> dict[str, str]:
        key = sample.name, sample.labels
        known = self._tagged.get(key)
        if known is None:
            own = dict(zip(self._labels[sample.name], sample.labels, strict=True))
            known = self._tagged[key] = {**self._tags, **own}
        return known


def _series(metric: Metric) -> list[tuple[str, tuple[str, ...]]]:
    """The names under which Prometheus has a metric, and their labels."""
    if metric.kind != "histogram":
        return [(metric.name, metric.labels)]
    return [
        (f"{metric.name}_bucket", (*metric.labels, "le")),
        (f"{metric.name}_sum", metric.labels),
        (f"{metric.name}_count", metric.labels),
    ]
