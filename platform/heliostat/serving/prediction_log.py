"""Every prediction, durable before the answer leaves.

Requests that were answered together share one stream entry, and its round trip. What can't be
logged isn't given out, unless the settings say otherwise: then the answer says ``"logged": false``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import orjson

from heliostat.errors import HeliostatError, PredictionLogError
from heliostat.serving.answers import PredictAnswer, Predictions
from heliostat.serving.requests import Inputs

_logger = logging.getLogger("heliostat.serving")


def log_record(
    answers: Sequence[PredictAnswer],
    predictions: Predictions,
    entities: Sequence[str],
    *,
    at_us: int,
    given: Sequence[Sequence[str]] | None = None,
    inputs: Inputs | None = None,
) -> bytes:
    """The stream entry of requests that were answered together, as JSON: a list a column.

    Args:
        answers: What is to be answered, by one model and one revision of its routing document.
        predictions: All of it, row by row; NaN in a vector becomes null.
        entities: Entity keys as text, row by row.
        at_us: The instant of the features, microseconds since the epoch.
        given: For each row, the qualified features whose values the request gave; None: none for anybody.
        inputs: What the requests brought for derived features, by row.
    """
    columns: dict[str, Any] = {
        "entity": entities,
        "variant": predictions.variants,
        "version": predictions.versions,
        "score": predictions.scores,
        "features": predictions.vectors,
    }
    # A column that says nothing isn't written.
    if any(predictions.missing):
        columns["missing"] = predictions.missing
    if any(predictions.fallbacks):
        columns["fallback"] = predictions.fallbacks
    if given is not None:
        columns["given"] = given
    if inputs:
        columns["inputs"] = [
            orjson.dumps(inputs[row]).decode() if row in inputs else None for row in range(len(entities))
        ]
    return orjson.dumps(
        {
            "model": answers[0].model,
            "revision": answers[0].revision,
            "at_us": at_us,
            "requests": [{"request_id": each.request_id, "rows": len(each.entity_ids)} for each in answers],
            "columns": columns,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


class PredictionLog:
    """Writes records to the prediction stream.

    Args:
        append: Appends records in one round trip; returns when the server has taken them.
        when_fails: ``reject`` raises when the log can't be written; ``answer`` says so and goes on.
    """

    def __init__(
        self,
        append: Callable[[list[bytes]], Awaitable[object]],
        *,
        when_fails: Literal["reject", "answer"] = "reject",
    ) -> None:
        self._append, self._when_fails = append, when_fails

    async def write(self, records: list[bytes], *, until: float) -> bool:
        """Make records durable.

        Args:
            records: One or several.
            until: When to stop waiting, on the event loop's clock, seconds.

        Returns:
            Whether they are durable.

        Raises:
            PredictionLogError: If they aren't, and that isn't allowed.
        """
        try:
            async with asyncio.timeout_at(until):
                await self._append(records)
        except (HeliostatError, OSError) as error:  # TimeoutError is an OSError
            reason = str(error) or "it took too long"
            _logger.warning("predictions aren't logged: %s", reason)
            if self._when_fails == "reject":
                raise PredictionLogError(reason) from error
            return False
        return True
