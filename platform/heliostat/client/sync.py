"""The client of programs without an event loop."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

from heliostat.client.answers import Features, Model, ModelVersion, Predictions, Sent
from heliostat.client.calls import AnswerT, ByEntity, Call, EntityId, Gateway, Pause, headers


@dataclass
class Client(Gateway):
    """A gateway. Safe to share between threads; use it as a context manager, or `close` it.

    What can be repeated safely is repeated after a timeout, a broken connection or a 503: events, since
    their ids tell them apart, and reads. Predictions and actuals are sent again only if the gateway said
    that it didn't take the request, since each one is logged.

    Args are those of `Gateway`, and:
        transport: How requests travel; None: over the network.
    """

    transport: httpx.BaseTransport | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._http = httpx.Client(timeout=self.timeout_s, transport=self.transport, headers=headers(self.api_key))
        self._waiting = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def send(self, source: str, events: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> Sent:
        """Send events, in batches; wrong ones don't stop the others.

        Args:
            source: The event source's name.
            events: One event, or any number of them: they are read as they are sent. Times as datetimes,
                ISO 8601 texts or microseconds since the epoch.

        Raises:
            GatewayError: If the gateway refuses a request as a whole. What came before is taken; sending
                all of it again is safe.
            GatewayUnreachableError: If it doesn't answer; again, sending all of it again is safe.
        """
        sent, most = self._run(self._calls.send(source, events, self.batch_events, self.batch_bytes))
        self.batch_events = min(self.batch_events, most)
        return sent

    def predict(
        self,
        entity_ids: Sequence[EntityId],
        *,
        model: str | None = None,
        features: ByEntity | None = None,
        inputs: ByEntity | None = None,
        explain: bool = False,
    ) -> Predictions:
        """Ask for predictions.

        Args:
            entity_ids: Whose.
            model: The model's name; may be left out where only one is declared.
            features: What the request knows better: one object for each entity id, or by entity id.
            inputs: What derived features take from the request, likewise.
            explain: Whether the answer says what each feature contributed.

        Raises:
            GatewayError: If the gateway refuses the request.
            GatewayUnreachableError: If it doesn't answer.
        """
        return self._run(
            self._calls.predict(entity_ids, model=model, features=features, inputs=inputs, explain=explain)
        )

    def actuals(self, actuals: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, model: str | None = None) -> int:
        """Report what became of predictions; how many were taken.

        Args:
            actuals: One, or any number: ``{"prediction_id", "value"}``, or ``{"entity_id", "as_of", "value"}``.
            model: The model's name; may be left out where only one is declared.

        Raises:
            GatewayError: If the gateway refuses a request. Requests before it are taken.
            GatewayUnreachableError: If it doesn't answer; nobody knows whether it took the last request.
        """
        return self._run(self._calls.actuals(actuals, model=model, most=self.batch_actuals))

    def features(self, view: str, entity: int | str) -> Features:
        """The online features of an entity, as a prediction at this instant would see them.

        Args:
            view: The view's name, or ``name@version``.
            entity: The entity's key; a key of several columns as text, ``part|part``.

        Raises:
            GatewayError: If the view isn't declared, or this is no key of its entity.
            GatewayUnreachableError: If the gateway doesn't answer.
        """
        return self._run(self._calls.features(view, entity))

    def models(self) -> tuple[Model, ...]:
        """The declared models, and what serves.

        Raises:
            GatewayError: If the gateway refuses the request.
            GatewayUnreachableError: If it doesn't answer.
        """
        return self._run(self._calls.models())

    def model(self, name: str, version: int | str = "latest") -> ModelVersion:
        """A version of a model: by number, by alias or ``latest``.

        Raises:
            GatewayError: If there is none.
            GatewayUnreachableError: If the gateway doesn't answer.
        """
        return self._run(self._calls.model(name, version))

    def _run(self, call: Call[AnswerT]) -> AnswerT:
        reply: httpx.Response | httpx.TransportError | None = None
        while True:
            try:
                step = call.send(reply)
            except StopIteration as done:
                answer: AnswerT = done.value
                return answer
            if isinstance(step, Pause):
                self._waiting.wait(step.seconds)
                reply = None
                continue
            try:
                reply = self._http.request(step.method, step.url, content=step.body)
            except httpx.TransportError as error:
                reply = error
