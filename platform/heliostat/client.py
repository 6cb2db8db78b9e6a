"""A gateway's client: send events, ask for predictions and features.

    client = Client("http://127.0.0.1:8000")
    client.send("purchases", [{"event_id": 1, "customer_id": 7, …}, …])
    client.predict([7, 8]).values

It needs httpx and orjson and nothing else of the platform: importing it loads neither Ray nor Arrow.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote

import httpx
import orjson

from heliostat.errors import GatewayError, GatewayUnreachableError

EntityId = int | str | Mapping[str, int | str]
"""An entity's key: a number, a text, or an object by key column."""

_LONGEST_PAUSE_S = 10.0
_BUSY = 503
# What a smaller request may cure.
_TOO_LARGE = ("too_many_events", "body_too_large")
_NUMPY_TOO = orjson.OPT_SERIALIZE_NUMPY


@dataclass(frozen=True)
class Rejected:
    """An event that the gateway refused; it is nowhere.

    Attributes:
        position: Where it was in what was sent, counted from 0.
        event_id: Its id, if it has one.
        reason: Why, in the gateway's words.
    """

    position: int
    event_id: int | str | None
    reason: str


@dataclass(frozen=True)
class Sent:
    """What became of events.

    Attributes:
        accepted: New events; the features of their entities have changed.
        duplicates: Known already. After a try whose answer was lost, that may be this client's own.
        late: New and in history, but too old for some online ring.
        rejected: Refused, with the reason.
        requests: How many requests it took, repetitions included.
    """

    accepted: int = 0
    duplicates: int = 0
    late: int = 0
    rejected: tuple[Rejected, ...] = ()
    requests: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(
            self.accepted + other.accepted,
            self.duplicates + other.duplicates,
            self.late + other.late,
            self.rejected + other.rejected,
            self.requests + other.requests,
        )

    def raise_for_rejected(self) -> Self:
        """Give itself back if nothing was refused.

        Raises:
            GatewayError: If something was: how much, and the first reason.
        """
        if self.rejected:
            first = self.rejected[0]
            message = f"{len(self.rejected)} events were rejected, the first (at {first.position}): {first.reason}"
            raise GatewayError("POST /events", 422, "events_rejected", message, "correct and send them again")
        return self


@dataclass(frozen=True)
class Prediction:
    """The prediction for one entity.

    Attributes:
        entity_id: As it was asked for.
        value: The prediction.
        prediction_id: Its name in the prediction log, for reporting what became of it.
        variant: The variant that the entity is assigned to.
        model_version: The version that answered.
        source: ``model`` or ``fallback``.
        missing_features: Features without a value when the model was asked.
        absent_views: Views that hold nothing about the entity.
    """

    entity_id: Any
    value: float
    prediction_id: str
    variant: str
    model_version: int
    source: Literal["model", "fallback"]
    missing_features: tuple[str, ...]
    absent_views: tuple[str, ...]


@dataclass(frozen=True)
class Predictions:
    """The answer to one request for predictions.

    Attributes:
        model: The model's name.
        model_version: The version that answered.
        request_id: Its name in the prediction log.
        entities: One an entity, in the request's order.
        logged: Whether they are in the prediction log.
        latency_ms: What the gateway needed.
    """

    model: str
    model_version: int
    request_id: str
    entities: tuple[Prediction, ...]
    logged: bool
    latency_ms: float

    @property
    def values(self) -> list[float]:
        """The predictions alone, in the request's order."""
        return [each.value for each in self.entities]


@dataclass(frozen=True)
class Features:
    """The online features of one entity.

    Attributes:
        view: Reference of the view: ``name@version``.
        entity: Its key, by column.
        as_of: The instant they are of, ISO 8601.
        absent: Whether the view holds nothing about it.
        values: By feature; None for null.
    """

    view: str
    entity: Mapping[str, int | str]
    as_of: str
    absent: bool
    values: Mapping[str, float | None]


@dataclass
class Client:
    """A gateway. Safe to share between threads; use it as a context manager, or `close` it.

    What can be repeated safely is repeated after a timeout, a broken connection or a 503: events, since
    their ids tell them apart, and reads. A prediction is asked for again only if the gateway said that
    it didn't take the request, since each one is logged.

    Args:
        url: ``http://host:port``, or below a path.
        timeout_s: A try's, seconds.
        tries: How often a request is sent at most.
        pause_s: Before the second try, seconds; doubled for each one after it, or what the gateway says.
        batch_events: Events a request; halved where the gateway takes fewer.
        batch_bytes: Bytes a request, about.
        transport: How requests travel; None: over the network.
    """

    url: str
    timeout_s: float = 5.0
    tries: int = 5
    pause_s: float = 0.1
    batch_events: int = 500
    batch_bytes: int = 900_000
    transport: httpx.BaseTransport | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self._http = httpx.Client(
            timeout=self.timeout_s, transport=self.transport, headers={"Content-Type": "application/json"}
        )
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

    # ── Events ───────────────────────────────────────────────────────────────────

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
        # A mapping is one event.
        many: Iterable[Mapping[str, Any]] = [events] if isinstance(events, Mapping) else events
        total, position = Sent(), 0
        for batch in self._batches(many):
            total += self._send(source, batch, position)
            position += len(batch)
        return total

    def _batches(self, events: Iterable[Mapping[str, Any]]) -> Iterator[list[bytes]]:
        batch: list[bytes] = []
        size = 0
        for event in events:
            text = orjson.dumps(event, option=_NUMPY_TOO)
            if batch and (len(batch) == self.batch_events or size + len(text) > self.batch_bytes):
                yield batch
                batch, size = [], 0
            batch.append(text)
            size += len(text) + 1
        if batch:
            yield batch

    def _send(self, source: str, batch: Sequence[bytes], position: int) -> Sent:
        body = b'{"source":%s,"events":[%s]}' % (orjson.dumps(source), b",".join(batch))
        try:
            document, requests = self._ask("POST", "/events", body, repeatable=True)
        except GatewayError as error:
            if error.code not in _TOO_LARGE or len(batch) == 1:
                raise
            half = len(batch) // 2
            self.batch_events = min(self.batch_events, half)
            return self._send(source, batch[:half], position) + self._send(source, batch[half:], position + half)
        rejected = tuple(
            Rejected(position + at, each["event_id"], each["reason"])
            for at, each in enumerate(document["results"])
            if each["status"] == "rejected"
        )
        return Sent(document["accepted"], document["duplicates"], document["late"], rejected, requests)

    # ── Reads ────────────────────────────────────────────────────────────────────

    def predict(
        self,
        entity_ids: Sequence[EntityId],
        *,
        model: str | None = None,
        features: Sequence[Mapping[str, Any] | None] | Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Predictions:
        """Ask for predictions.

        Args:
            entity_ids: Whose.
            model: The model's name; may be left out where only one is declared.
            features: What the request knows better: one object for each entity id, or by entity id.

        Raises:
            GatewayError: If the gateway refuses the request.
            GatewayUnreachableError: If it doesn't answer.
        """
        asked: dict[str, Any] = {"entity_ids": list(entity_ids)}
        asked |= {name: value for name, value in (("model", model), ("features", features)) if value is not None}
        answer, _ = self._ask("POST", "/predict", orjson.dumps(asked, option=_NUMPY_TOO), repeatable=False)
        return Predictions(
            model=answer["model"],
            model_version=answer["model_version"],
            request_id=answer["request_id"],
            entities=tuple(
                Prediction(
                    entity_id=each["entity_id"],
                    value=each["prediction"],
                    prediction_id=each["prediction_id"],
                    variant=each["variant"],
                    model_version=each["model_version"],
                    source=each["source"],
                    missing_features=tuple(each["missing_features"]),
                    absent_views=tuple(each["absent_views"]),
                )
                for each in answer["entities"]
            ),
            logged=answer["logged"],
            latency_ms=answer["latency_ms"],
        )

    def features(self, view: str, entity: int | str) -> Features:
        """The online features of an entity, as a prediction at this instant would see them.

        Args:
            view: The view's name, or ``name@version``.
            entity: The entity's key; a key of several columns as text, ``part|part``.

        Raises:
            GatewayError: If the view isn't declared, or this is no key of its entity.
            GatewayUnreachableError: If the gateway doesn't answer.
        """
        path = f"/features/{quote(view, safe='')}/{quote(str(entity), safe='')}"
        answer, _ = self._ask("GET", path, None, repeatable=True)
        return Features(answer["view"], answer["entity"], answer["as_of"], answer["absent"], answer["features"])

    # ── Requests ─────────────────────────────────────────────────────────────────

    def _ask(self, method: str, path: str, body: bytes | None, *, repeatable: bool) -> tuple[dict[str, Any], int]:
        request, pause_s = f"{method} {path}", self.pause_s
        reason, refusal = "", None
        for attempt in range(1, self.tries + 1):
            wanted_s = 0.0
            try:
                reply = self._http.request(method, self.url + path, content=body)
            except httpx.TransportError as error:
                refusal, reason = None, f"{type(error).__name__}: {error}".rstrip(": ")
                # Without a connection nothing was sent; after that, nobody knows what arrived.
                if not (repeatable or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)):
                    raise GatewayUnreachableError(request, self.url, attempt, reason) from error
            else:
                if reply.status_code != _BUSY:
                    return self._understood(request, reply), attempt
                refusal = _refused(request, reply)
                wanted_s = _seconds(reply.headers.get("Retry-After"))
            if attempt < self.tries:
                # Many clients that failed together shouldn't come back together.
                spread = random.uniform(0.5, 1.0)  # noqa: S311 - spreads out clients
                self._waiting.wait(max(wanted_s, min(pause_s, _LONGEST_PAUSE_S) * spread))
                pause_s *= 2
        if refusal is not None:
            raise refusal
        raise GatewayUnreachableError(request, self.url, self.tries, reason)

    def _understood(self, request: str, reply: httpx.Response) -> dict[str, Any]:
        document = _document(reply)
        # Events that were refused one by one are an answer, also if it was all of them.
        if document is None or (reply.status_code >= 300 and "results" not in document):
            raise _refused(request, reply)
        return document


def _document(reply: httpx.Response) -> dict[str, Any] | None:
    try:
        document = orjson.loads(reply.content)
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


def _refused(request: str, reply: httpx.Response) -> GatewayError:
    document = _document(reply) or {}
    said = str(document.get("message") or reply.text[:200] or "nothing more")
    hints = [document.get("fix")]
    if isinstance(known := document.get("known"), list) and known:
        hints.append(f"there are: {', '.join(map(str, known))}")
    told = "; ".join(each for each in hints if isinstance(each, str) and each not in said)
    return GatewayError(request, reply.status_code, str(document.get("error", "not_a_gateway")), said, told)


def _seconds(text: str | None) -> float:
    return min(float(text), _LONGEST_PAUSE_S) if text is not None and text.isdigit() else 0.0
