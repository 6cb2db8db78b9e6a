"""What a replica counts of its work: cumulative numbers in memory, cheap to add to, read every few seconds.

Whoever exports them (`deployments.meter`) reads `Board.samples`. To add to a number costs a dictionary look-up,
to a histogram a bisection; what is said of each row of a batch is kept as it is and sorted out by the reader.
So a row costs a fraction of a microsecond, no more if there are more metrics, and nobody waits for it
(`Meter.later`). Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, repeat
from typing import NamedTuple

from heliostat.errors import DependencyOpenError
from heliostat.telemetry import METRICS, Metric

STAGES = ("parse", "wait", "lookup", "route", "predict", "log")
"""Where a prediction request's time goes, in this order; each is a metric ``heliostat_STAGE_latency_ms``."""

CAUSES = ("open", "timeout", "error")
"""Why a rung of the ladder stood in: a breaker was open, no answer came in time, the answer was an error."""

# Rows that are alike are counted together; if ever so many are unlike, they are sorted out before they are asked for.
_UNSORTED = 4_096


def cause_of(error: BaseException) -> str:
    """Which of `CAUSES` an error is."""
    if isinstance(error, DependencyOpenError):
        return "open"
    return "timeout" if isinstance(error, TimeoutError) else "error"


class Distribution:
    """How often values fell into each bucket, and their sum.

    Args:
        bounds: The buckets' upper bounds, each within its bucket, rising; one more bucket is above the last.
    """

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, ``times`` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self._counts)

    def cumulative(self) -> Iterator[tuple[str, int]]:
        """For each bound, as Prometheus writes it, how many values were at most that; ``+Inf`` the last."""
        names = (*(f"{bound:g}" for bound in self._bounds), "+Inf")
        return zip(names, accumulate(self._counts), strict=True)


class Sample(NamedTuple):
    """One number, as Prometheus knows it.

    Attributes:
        name: The metric's; a histogram's with ``_bucket``, ``_sum`` or ``_count``.
        labels: Values of the metric's labels; of a bucket with ``le`` as the last one.
        value: The number; counters and histograms never fall.
    """

    name: str
    labels: tuple[str, ...]
    value: float


class Board:
    """Every number of a process, by metric and labels.

    Args:
        metrics: The catalogue.
    """

    def __init__(self, metrics: Iterable[Metric] = METRICS) -> None:
        self._metrics: Mapping[str, Metric] = {metric.name: metric for metric in metrics}
        self._numbers: dict[tuple[str, tuple[object, ...]], float] = {}
        self._distributions: dict[tuple[str, tuple[object, ...]], Distribution] = {}
        self._sources: list[Callable[[], object]] = []

    def add(self, name: str, *labels: object, by: float = 1) -> None:
        """Add to a counter; by 0 makes it known, so that its first rise is seen as one."""
        key = name, labels
        self._numbers[key] = self._numbers.get(key, 0) + by

    def set(self, name: str, *labels: object, value: float) -> None:
        """Set a gauge."""
        self._numbers[name, labels] = value

    def distribution(self, name: str, *labels: object) -> Distribution:
        """A histogram to add to; the same one for the same labels."""
        key = name, labels
        known = self._distributions.get(key)
        if known is None:
            known = self._distributions[key] = Distribution(self._metrics[name].bounds)
        return known

    def ask(self, source: Callable[[], object]) -> None:
        """Have something put in its numbers whenever they are read."""
        self._sources.append(source)

    def value(self, name: str, *labels: object) -> float:
        """A counter or gauge as it is now, a histogram's count; 0 if there is none."""
        self._collect()
        found = self._distributions.get((name, labels))
        return self._numbers.get((name, labels), 0) if found is None else found.count

    def samples(self) -> list[Sample]:
        """All numbers as they are now."""
        self._collect()
        found = [Sample(name, tuple(map(str, labels)), value) for (name, labels), value in self._numbers.items()]
        for (name, labels), each in self._distributions.items():
            texts = tuple(map(str, labels))
            found += [Sample(f"{name}_bucket", (*texts, bound), count) for bound, count in each.cumulative()]
            found += [Sample(f"{name}_sum", texts, each.total), Sample(f"{name}_count", texts, each.count)]
        return found

    def _collect(self) -> None:
        for source in self._sources:
            source()


class Meter:
    """Counts what a gateway does.

    Args:
        board: Where it is kept.
    """

    def __init__(self, board: Board | None = None) -> None:
        self.board = board or Board()
        self.in_flight = 0
        """Requests that are being answered."""
        self._requests: dict[tuple[str, int], int] = {}
        self._latencies: dict[str, Distribution] = {}
        self._models: dict[str, ModelMeter] = {}
        self._uncounted: deque[Callable[[], None]] = deque()
        self._is_due = False
        self.board.ask(self._told)

    def later(self, count: Callable[[], None]) -> None:
        """Have something counted once the answers that the caller is about to give have left, or numbers are read.

        Those who are answered go on in the event loop's next pass; this is done in the one behind it. For a hundred
        entities it takes 20 to 45 µs, for which nobody has to wait.
        """
        self._uncounted.append(count)
        if not self._is_due:
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._catch_up)
            self._is_due = True

    def _catch_up(self) -> None:
        self._is_due = False
        while self._uncounted:
            self._uncounted.popleft()()

    def answered(self, route: str, status: int, latency_ms: float) -> None:
        """Count a request."""
        key = route, status
        self._requests[key] = self._requests.get(key, 0) + 1
        latency = self._latencies.get(route)
        if latency is None:
            latency = self._latencies[route] = self.board.distribution("heliostat_request_latency_ms", route)
        latency.add(latency_ms)

    def took_in(self, source: str, outcome: str, events: int) -> None:
        """Count events."""
        self.board.add("heliostat_events_total", source, outcome, by=events)

    def watch_breakers(self, states: Callable[[], Mapping[str, str]]) -> None:
        """Have the state of circuit breakers looked at, by dependency."""

        def look() -> None:
            for dependency, state in states().items():
                value = ("closed", "half-open", "open").index(state)
                self.board.set("heliostat_breaker_state", dependency, value=value)

        self.board.ask(look)

    def of(self, model: str) -> ModelMeter:
        """What is counted of one model."""
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = ModelMeter(model, self.board)
        return known

    def batch(self, queue: str, *, requests: int, rows: int) -> None:
        """Count what went through a queue in one call."""
        self.board.distribution("heliostat_batch_requests", queue).add(requests)
        self.board.distribution("heliostat_batch_rows", queue).add(rows)

    def watch(self, queues: Callable[[], Iterable[tuple[str, int, int]]]) -> None:
        """Have queues looked at: their name, how many wait in them, and how many calls are under way."""

        def look() -> None:
            for name, waiting, in_flight in queues():
                self.board.set("heliostat_queue_waiting", name, value=waiting)
                self.board.set("heliostat_queue_calls_in_flight", name, value=in_flight)

        self.board.ask(look)

    def _told(self) -> None:
        self._catch_up()
        for (route, status), number in self._requests.items():
            self.board.set("heliostat_requests_total", route, status, value=number)
        self.board.set("heliostat_requests_in_flight", value=self.in_flight)


class ModelMeter:
    """Counts what is predicted by one model, whatever its versions.

    Args:
        model: Its name.
        board: Where it is kept.
    """

    def __init__(self, model: str, board: Board) -> None:
        self._model, self._board = model, board
        self._stages = [board.distribution(f"heliostat_{stage}_latency_ms", model) for stage in STAGES]
        self._requests = board.distribution("heliostat_batch_requests", f"predict {model}")
        self._rows = board.distribution("heliostat_batch_rows", f"predict {model}")
        self._answered: Counter[tuple[int, str]] = Counter()
        self._missing: Counter[tuple[str, ...]] = Counter()
        self._route: tuple[int, int] | None = None
        board.ask(self._told)

    def parsed(self, latency_ms: float) -> None:
        """Count how long a request's body took to read."""
        self._stages[0].add(latency_ms)

    def batch(self, waited_s: Iterable[float], *, rows: int, marks_s: Sequence[float]) -> None:
        """Count a batch: each stage as long as every one of its requests had to wait for it.

        Args:
            waited_s: For each request, how long it waited for the batch to begin, seconds.
            rows: Entities in it.
            marks_s: When it began, and when look-up, routing, prediction and log were done, seconds; as far as
                it came.
        """
        _, wait, *stages = self._stages
        requests = 0
        for each in waited_s:
            wait.add(each * 1e3)
            requests += 1
        before = marks_s[0]
        for stage, mark in zip(stages, marks_s[1:], strict=False):
            stage.add((mark - before) * 1e3, requests)
            before = mark
        self._requests.add(requests)
        self._rows.add(rows)

    def predicted(
        self,
        versions: Sequence[int],
        variants: Sequence[str],
        missing: Sequence[tuple[str, ...]],
        *,
        logged: bool = True,
    ) -> None:
        """Count predictions, row by row: who made them, for which variant, and which features had no value."""
        self._answered.update(zip(versions, variants, strict=True))
        if any(missing):
            self._missing.update(missing)
        if not logged:
            self._board.add("heliostat_unlogged_predictions_total", self._model, by=len(versions))
        if len(self._missing) > _UNSORTED:
            self._sort_out()

    def fell_back(self, rungs: Sequence[str | None], causes: Sequence[str | None]) -> None:
        """Count what stood in and why, row by row, None where nothing did; no causes: nothing did for anybody."""
        if not causes:
            return
        for (rung, cause), number in Counter(zip(rungs, causes, strict=False)).items():
            if rung is not None and cause is not None:
                self._board.add("heliostat_fallbacks_total", self._model, rung, cause, by=number)

    def expect(self, rungs: Iterable[str]) -> None:
        """Make the counters of these rungs known: of one that shows up with its first fallback, no rise is seen."""
        for rung in rungs:
            for cause in CAUSES:
                self._board.add("heliostat_fallbacks_total", self._model, rung, cause, by=0)

    def routed(self, revision: int, version: int) -> None:
        """Note the routing document by which a batch was answered, and the control's version in it."""
        self._route = revision, version

    def _told(self) -> None:
        self._sort_out()
        for (version, variant), number in self._answered.items():
            self._board.set("heliostat_predictions_total", self._model, version, variant, value=number)
        if self._route is not None:
            self._board.set("heliostat_routing_revision", self._model, value=self._route[0])
            self._board.set("heliostat_serving_version", self._model, value=self._route[1])

    def _sort_out(self) -> None:
        features: Counter[str] = Counter()
        for names, number in self._missing.items():
            features.update(dict(zip(names, repeat(number), strict=False)))
        self._missing.clear()
        for name, number in features.items():
            self._board.add("heliostat_missing_features_total", self._model, name, by=number)
