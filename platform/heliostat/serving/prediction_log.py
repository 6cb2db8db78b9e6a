"""Every prediction, durable before the answer leaves.

One stream entry a request; the entries of requests that were answered together share one
round trip. What can't be logged isn't given out, unless the settings say otherwise: then the
answer says ``"logged": false``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from heliostat.errors import HeliostatError, PredictionLogError
from heliostat.serving.requests import Inputs, PredictAnswer

_logger = logging.getLogger("heliostat.serving")


def log_record(
    answer: PredictAnswer,
    entities: Sequence[str],
    vectors: Sequence[NDArray[np.float64]],
    *,
    at_us: int,
    given: Sequence[Sequence[str]] | None = None,
    inputs: Inputs | None = None,
) -> bytes:
    """The stream entry of one request, as JSON.

    Args:
        answer: What is to be answered.
        entities: Entity keys as text, in the request's order.
        vectors: What the model saw, one an entity, shape ``(n_features,)`` each, in the order of the
            signature of the version that answered; NaN becomes null.
        at_us: The instant of the features, microseconds since the epoch.
        given: For each entity, the qualified features whose values the request gave; None: none for anybody.
        inputs: What the request brought for derived features, by row.
    """
    overridden = [()] * len(entities) if given is None else given
    brought = inputs or {}
    return orjson.dumps(
        {
            "request_id": answer.request_id,
            "model": answer.model,
            "revision": answer.revision,
            "at_us": at_us,
            "entries": [
                {
                    "prediction_id": each.prediction_id,
                    "entity": entity,
                    "variant": each.variant,
                    "version": each.version,
                    "score": each.score,
                    "features": vector,
                    "missing": each.missing,
                    "source": each.source,
                    "fallback": each.fallback,
                    "given": names,
                    "inputs": orjson.dumps(brought[row]).decode() if row in brought else None,
                }
                for row, (each, entity, vector, names) in enumerate(
                    zip(answer.entities, entities, vectors, overridden, strict=True)
                )
            ],
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
            records: One a request.
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
            _logger.warning("%d prediction records aren't logged: %s", len(records), reason)
            if self._when_fails == "reject":
                raise PredictionLogError(reason) from error
            return False
        return True
