"""The client of programs with an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

from heliostat.client.answers import Features, Model, ModelVersion, Predictions, Sent
from heliostat.client.calls import AnswerT, ByEntity, Call, EntityId, Gateway, Pause, headers


@dataclass
class AsyncClient(Gateway):
    """A gateway, as `heliostat.client.Client`; any number of calls may be under way on one event loop.

    Use it as a context manager, or `close` it. Arguments, answers and errors are those of `Client`.

    Args are those of `Gateway`, and:
        connections: Open to the gateway at once, at most; further calls wait for one.
        transport: How requests travel; None: over the network.
    """

    connections: int = 100
    transport: httpx.AsyncBaseTransport | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._http = httpx.AsyncClient(
            # A call that waits for a connection isn't late: it hasn't begun.
            timeout=httpx.Timeout(self.timeout_s, pool=None),
            limits=httpx.Limits(max_connections=self.connections, max_keepalive_connections=self.connections),
            transport=self.transport,
            headers=headers(self.api_key),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def send(self, source: str, events: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> Sent:
        """As `Client.send`."""
        sent, most = await self._run(self._calls.send(source, events, self.batch_events, self.batch_bytes))
        self.batch_events = min(self.batch_events, most)
        return sent

    async def predict(
        self,
        entity_ids: Sequence[EntityId],
        *,
        model: str | None = None,
        features: ByEntity | None = None,
        inputs: ByEntity | None = None,
        explain: bool = False,
    ) -> Predictions:
        """As `Client.predict`."""
        return await self._run(
            self._calls.predict(entity_ids, model=model, features=features, inputs=inputs, explain=explain)
        )

    async def actuals(
        self, actuals: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, model: str | None = None
    ) -> int:
        """As `Client.actuals`."""
        return await self._run(self._calls.actuals(actuals, model=model, most=self.batch_actuals))

    async def features(self, view: str, entity: int | str) -> Features:
        """As `Client.features`."""
        return await self._run(self._calls.features(view, entity))

    async def models(self) -> tuple[Model, ...]:
        """As `Client.models`."""
        return await self._run(self._calls.models())

    async def model(self, name: str, version: int | str = "latest") -> ModelVersion:
        """As `Client.model`."""
        return await self._run(self._calls.model(name, version))

    async def _run(self, call: Call[AnswerT]) -> AnswerT:
        reply: httpx.Response | httpx.TransportError | None = None
        while True:
            try:
                step = call.send(reply)
            except StopIteration as done:
                answer: AnswerT = done.value
                return answer
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                reply = None
                continue
            try:
                reply = await self._http.request(step.method, step.url, content=step.body)
            except httpx.TransportError as error:
                reply = error
