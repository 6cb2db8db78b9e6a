"""A gateway's client: send events, ask for predictions and features, report what became of them.

    client = Client("http://127.0.0.1:8000")
    client.send("purchases", [{"event_id": 1, "customer_id": 7, …}, …])
    client.predict([7, 8]).values

`AsyncClient` is the same for programs with an event loop. Both need httpx and orjson and nothing else of the
platform: importing this loads neither Ray nor Arrow.
"""

from __future__ import annotations

from heliostat.client.answers import (
    Explanation,
    Features,
    Model,
    ModelVersion,
    Prediction,
    Predictions,
    Rejected,
    Sent,
)
from heliostat.client.asynchronous import AsyncClient
from heliostat.client.calls import EntityId
from heliostat.client.sync import Client

__all__ = [
    "AsyncClient",
    "Client",
    "EntityId",
    "Explanation",
    "Features",
    "Model",
    "ModelVersion",
    "Prediction",
    "Predictions",
    "Rejected",
    "Sent",
]
