"""Every prediction, durable before the answer leaves.

Requests that were answered together share one stream entry, and its round trip. What can't be
logged isn't given out, unless the settings say otherwise: then the answer says ``"logged": false``.
With ``serving.log: async`` answers don't wait, and say the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from heliostat.errors import HeliostatError, PredictionLogError
from heliostat.serving.answers import FORCED, PredictAnswer, Predictions
from heliostat.serving.request_batch import RequestBatch
from heliostat.serving.requests import Inputs
from heliostat.serving.telemetry import Board
from heliostat.storage.quick_commands import Held
from heliostat.storage.stream_entries import prediction_entry
from heliostat.storage.streams import CheckedRecord
from heliostat.timers import Deadlines
from heliostat.tracing import Trace

FloatArray = NDArray[np.float64]

_logger = logging.getLogger("heliostat.serving")

# Of a buffer: how long one try to write it may take, and the pauses between tries, seconds.
_TRY_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5


def log_record(
    answers: Sequence[PredictAnswer],
    predictions: Predictions,
    entities: Sequence[str],
    *,
    at_us: int,
    given: Sequence[Sequence[str]] | None = None,
    inputs: Inputs | None = None,
    newest_us: FloatArray | None = None,
    traces: Sequence[Trace | None] | None = None,
) -> bytes:
    """The stream entry of requests that were answered together, a list a column, or one value for all rows.

    Args:
        answers: What is to be answered, by one model and one revision of its routing document.
        predictions: All of it, row by row.
        entities: Entity keys as text, row by row.
        at_us: The instant of the features, microseconds since the epoch.
        given: For each row, the qualified features whose values the request gave; None: none for anybody.
        inputs: What the requests brought for derived features, by row.
        newest_us: Where each row's newest tile begins (`FeatureBatch.newest_us`), shape ``(n,)``; None: nobody knows.
        traces: What each request belongs to, and when it arrived; None: nobody knows.
    """
    columns: dict[str, Any] = {
        "entity": entities,
        "variant": predictions.variants,
        "version": predictions.versions,
        "score": predictions.scores,
    }
    requests: list[dict[str, Any]] = [
        {"request_id": each.request_id, "rows": len(each.entity_ids)} for each in answers
    ]
    for request, trace in zip(requests, traces or (), strict=traces is not None):
        if trace is not None:
            request["trace_id"], request["latency_ms"] = trace.trace_id, round(trace.age_ms, 3)
    if predictions.variants[0].startswith(FORCED):  # such a request is alone in its batch
        requests[0]["forced"] = True
    # A column that says nothing isn't written.
    if any(predictions.missing):
        columns["missing"] = predictions.missing
    if any(predictions.fallbacks):
        columns["fallback"] = predictions.fallbacks
    if given is not None:
        columns["given"] = given
    same = {name: columns.pop(name)[0] for name in ("variant", "version", "given") if _is_same(columns.get(name))}
    if newest_us is not None:
        columns["newest_event"] = newest_us
    if inputs:
        columns["inputs"] = [
            orjson.dumps(inputs[row]).decode() if row in inputs else None for row in range(len(entities))
        ]
    document = {
        "model": answers[0].model,
        "revision": answers[0].revision,
        "at_us": at_us,
        "requests": requests,
        "columns": columns,
        "same": same,
    }
    return prediction_entry(document, predictions.vectors)


def batch_record(
    batch: RequestBatch,
    answers: Sequence[PredictAnswer],
    predictions: Predictions,
    given: Sequence[Sequence[str]] | None,
) -> bytes:
    """`log_record` of what a batch was asked, and what is to be answered."""
    return log_record(
        answers,
        predictions,
        batch.query.entities,
        at_us=batch.block.as_of_us,
        given=given,
        inputs=batch.query.inputs,
        newest_us=batch.block.newest_us,
        traces=[each.trace for each in batch.requests],
    )


def _is_same(column: Sequence[Any] | None) -> bool:
    """Whether a column says the same of every row: it is written once then."""
    return column is not None and column.count(column[0]) == len(column)


class RouteChangedError(Exception):
    """What a record says was decided by a routing document that no longer holds: it isn't logged. Caught inside."""


class PredictionLog:
    """Writes records to the prediction stream. Belongs to one event loop.

    With a buffer, answers don't wait: what a process that is killed may lose is what lies in the buffer. That is
    at most ``buffer_rows`` rows, and at most the answers of ``max_delay_s`` seconds: as soon as the oldest row has
    waited that long, or the buffer is full, writes wait for the server again, and fail if it doesn't answer.

    Where the log can't be written and answers go out all the same, their rows are kept in memory and written as soon
    as the server answers again: what is lost is what doesn't fit, or lies there when the process is killed.

    Args:
        append: Appends records in one round trip; returns when the server has taken them.
        append_while: Appends one record if a key of the server holds what it has to, and says whether it did; None:
            the server can't.
        when_fails: ``reject`` raises when the log can't be written; ``answer`` says so and goes on.
        buffer_rows: Rows that may be in memory only when their answers leave; 0: none.
        late_rows: With ``answer``: rows that may wait in memory for a server that doesn't answer.
        max_delay_s: How long the oldest of them may have waited, seconds.
        grace_s: How long `close` tries to write what lies in memory, seconds.
    """

    def __init__(
        self,
        append: Callable[[list[bytes]], Awaitable[object]],
        append_while: Callable[[CheckedRecord], Awaitable[bool]] | None = None,
        *,
        when_fails: Literal["reject", "answer"] = "reject",
        buffer_rows: int = 0,
        late_rows: int = 0,
        max_delay_s: float = 1.0,
        grace_s: float = 4.0,
    ) -> None:
        self._append, self._append_while, self._when_fails = append, append_while, when_fails
        self._buffer_rows, self._late_rows, self._max_delay_s = buffer_rows, late_rows, max_delay_s
        self._grace_s = grace_s
        self._buffer: deque[_Buffered] = deque()
        self._flushing: asyncio.Task[None] | None = None
        self._deadlines = Deadlines()
        self._closed = False
        self.buffered_rows = 0
        """Rows that are in memory only."""

    def report(self, board: Board) -> None:
        """Put into numbers what lies in the buffer."""
        board.set("heliostat_log_buffer_rows", value=self.buffered_rows)

    @property
    def checks(self) -> bool:
        """Whether `write` can see to it that a key holds something when it writes: not where answers don't wait."""
        return self._append_while is not None and not self._buffer_rows

    async def write(self, records: list[bytes], *, rows: int, until: float, held: Held | None = None) -> bool:
        """Make records durable, now or (with a buffer) soon.

        Args:
            records: One or several.
            rows: Predictions in them.
            until: When to stop waiting, on the event loop's clock, seconds.
            held: What has to hold then, of one record; None: nothing. See `checks`.

        Returns:
            Whether they are durable.

        Raises:
            RouteChangedError: If ``held`` doesn't hold; then they aren't.
            PredictionLogError: If they aren't, and that isn't allowed.
        """
        if self._has_room(rows):
            self._keep(records, rows)
            return False
        try:
            with self._deadlines.until(until):
                if held is None or self._append_while is None:
                    await self._append(records)
                elif not await self._append_while((records[0], held)):
                    raise RouteChangedError
        except (HeliostatError, OSError) as error:  # TimeoutError is an OSError
            reason = str(error) or "it took too long"
            if self._when_fails == "reject":
                _logger.warning("predictions aren't logged: %s", reason)
                raise PredictionLogError(reason) from error
            if not self._closed and self.buffered_rows + rows <= self._late_rows:
                self._keep(records, rows)
            else:
                _logger.warning("%d predictions are answered and not logged: %s", rows, reason)
            return False
        return True

    async def close(self) -> None:
        """Write what is in the buffer; from now on writes wait."""
        self._closed = True
        flushing = self._flushing
        if flushing is not None:
            await asyncio.wait([flushing], timeout=self._grace_s)
            flushing.cancel()
        if self.buffered_rows:
            _logger.error("%d predictions that were answered are lost: the log can't be written", self.buffered_rows)

    def _keep(self, records: list[bytes], rows: int) -> None:
        """Write records later."""
        self._buffer.append(_Buffered(records, rows, asyncio.get_running_loop().time()))
        self.buffered_rows += rows
        if self._flushing is None:
            # A context of its own: it writes for many requests.
            self._flushing = asyncio.get_running_loop().create_task(self._flush(), context=Context())

    def _has_room(self, rows: int) -> bool:
        if self._closed or self.buffered_rows + rows > self._buffer_rows:
            return False
        return not self._buffer or asyncio.get_running_loop().time() < self._buffer[0].since + self._max_delay_s

    async def _flush(self) -> None:
        """Write the buffer until it is empty; what fails is tried again. Of what comes twice the sink keeps one."""
        pause_s = _FIRST_PAUSE_S
        try:
            while self._buffer:
                taken = len(self._buffer)
                try:
                    async with asyncio.timeout(_TRY_S):
                        await self._append([record for each in self._buffer for record in each.records])
                except Exception as error:  # noqa: BLE001 - whatever it is, what was answered has to be written
                    if pause_s == _FIRST_PAUSE_S:
                        _logger.warning(
                            "%d predictions wait in memory: %s", self.buffered_rows, str(error) or "it took too long"
                        )
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                    continue
                pause_s = _FIRST_PAUSE_S
                for _ in range(taken):
                    self.buffered_rows -= self._buffer.popleft().rows
        finally:
            self._flushing = None


@dataclass(frozen=True, slots=True)
class _Buffered:
    records: list[bytes]
    rows: int
    since: float
