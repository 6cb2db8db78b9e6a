"""What a client says to a gateway, and when it says it again. Pure: whoever runs it does the sending and the waiting.

Each call is a generator: it yields a `Request` and is sent the reply, or the error of the transport; it yields a
`Pause` and is sent nothing; and it returns the answer. So both clients have one logic.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote

import httpx
import orjson

from heliostat.client.answers import Features, Model, ModelVersion, Predictions, Sent
from heliostat.errors import GatewayError, GatewayUnreachableError

EntityId: TypeAlias = int | str | Mapping[str, int | str]
"""An entity's key: a number, a text, or an object by key column."""

ByEntity: TypeAlias = Sequence[Mapping[str, Any] | None] | Mapping[str, Mapping[str, Any]]
"""Something about each entity: one object for each entity id, or by entity id."""

_LONGEST_PAUSE_S = 10.0
_BUSY = 503
# What a smaller request may cure.
_TOO_LARGE = ("too_many_events", "body_too_large")
_NUMPY_TOO = orjson.OPT_SERIALIZE_NUMPY


@dataclass(frozen=True)
class Request:
    """To be sent."""

    method: str
    url: str
    body: bytes | None


@dataclass(frozen=True)
class Pause:
    """To be waited for, seconds."""

    seconds: float


AnswerT = TypeVar("AnswerT")
Call: TypeAlias = Generator[Request | Pause, httpx.Response | httpx.TransportError | None, AnswerT]


class Calls:
    """What can be said to one gateway.

    Args:
        url: Without a slash at its end.
        tries: See `Gateway`.
        pause_s: See `Gateway`.
    """

    def __init__(self, url: str, *, tries: int, pause_s: float) -> None:
        self._url, self._tries, self._pause_s = url, tries, pause_s

    def send(
        self, source: str, events: Mapping[str, Any] | Iterable[Mapping[str, Any]], most: int, most_bytes: int
    ) -> Call[tuple[Sent, int]]:
        """Send events; the answer also says how many go into a request of this gateway."""
        # A mapping is one event.
        many: Iterable[Mapping[str, Any]] = [events] if isinstance(events, Mapping) else events
        total, position = Sent(), 0
        for batch in _batches(many, most, most_bytes):
            sent, most = yield from self._send(source, batch, position, most)
            total += sent
            position += len(batch)
        return total, most

    def _send(self, source: str, batch: Sequence[bytes], position: int, most: int) -> Call[tuple[Sent, int]]:
        if len(batch) > most:
            at = most
            left, most = yield from self._send(source, batch[:at], position, most)
            right, most = yield from self._send(source, batch[at:], position + at, most)
            return left + right, most
        body = b'{"source":%s,"events":[%s]}' % (orjson.dumps(source), b",".join(batch))
        try:
            answer, requests = yield from self._ask("POST", "/events", body, repeatable=True)
        except GatewayError as error:
            if error.code not in _TOO_LARGE or len(batch) == 1:
                raise
            return (yield from self._send(source, batch, position, len(batch) // 2))
        return Sent.read(answer, position, requests), most

    def predict(
        self,
        entity_ids: Sequence[EntityId],
        *,
        model: str | None,
        features: ByEntity | None,
        inputs: ByEntity | None,
        explain: bool,
    ) -> Call[Predictions]:
        """Ask for predictions."""
        asked: dict[str, Any] = {"entity_ids": list(entity_ids)}
        if features is not None:
            asked["features"] = features
        if inputs is not None:
            asked["inputs"] = inputs
        if explain:
            asked["explain"] = True
        path = "/predict" if model is None else f"/models/{quote(model, safe='')}/predict"
        answer, _ = yield from self._ask("POST", path, orjson.dumps(asked, option=_NUMPY_TOO), repeatable=False)
        return Predictions.read(answer)

    def actuals(
        self, actuals: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, model: str | None, most: int
    ) -> Call[int]:
        """Report what became of predictions."""
        many = [actuals] if isinstance(actuals, Mapping) else list(actuals)
        taken = 0
        for first in range(0, len(many), most):
            body: dict[str, Any] = {"actuals": many[first : first + most]}
            if model is not None:
                body["model"] = model
            document = orjson.dumps(body, option=_NUMPY_TOO)
            answer, _ = yield from self._ask("POST", "/actuals", document, repeatable=False)
            taken += int(answer["accepted"])
        return taken

    def features(self, view: str, entity: int | str) -> Call[Features]:
        """The online features of an entity."""
        path = f"/features/{quote(view, safe='')}/{quote(str(entity), safe='')}"
        return Features.read((yield from self._read(path)))

    def models(self) -> Call[tuple[Model, ...]]:
        """The declared models."""
        answer = yield from self._read("/models")
        return tuple(Model.read(each) for each in answer["models"])

    def model(self, name: str, version: int | str) -> Call[ModelVersion]:
        """A version of a model."""
        path = f"/models/{quote(name, safe='')}/{quote(str(version), safe='')}"
        return ModelVersion.read((yield from self._read(path)))

    def _read(self, path: str) -> Call[dict[str, Any]]:
        answer, _ = yield from self._ask("GET", path, None, repeatable=True)
        return answer

    def _ask(
        self, method: str, path: str, body: bytes | None, *, repeatable: bool
    ) -> Call[tuple[dict[str, Any], int]]:
        """An answer, and how many requests it took."""
        request, pause_s = f"{method} {path}", self._pause_s
        reason, refusal = "", None
        for attempt in range(1, self._tries + 1):
            wanted_s = 0.0
            reply = yield Request(method, self._url + path, body)
            if isinstance(reply, httpx.TransportError):
                refusal, reason = None, f"{type(reply).__name__}: {reply}".rstrip(": ")
                # Without a connection nothing was sent; after that, nobody knows what arrived.
                if not (repeatable or isinstance(reply, httpx.ConnectError | httpx.ConnectTimeout)):
                    raise GatewayUnreachableError(request, self._url, attempt, reason) from reply
            elif reply is not None:
                if reply.status_code != _BUSY:
                    return _understood(request, reply), attempt
                refusal = _refused(request, reply)
                wanted_s = _seconds(reply.headers.get("Retry-After"))
            if attempt < self._tries:
                # Many clients that failed together shouldn't come back together.
                spread = random.uniform(0.5, 1.0)  # noqa: S311 - spreads out clients
                yield Pause(max(wanted_s, min(pause_s, _LONGEST_PAUSE_S) * spread))
                pause_s *= 2
        if refusal is not None:
            raise refusal
        raise GatewayUnreachableError(request, self._url, self._tries, reason)


@dataclass
class Gateway:
    """Where a gateway is, and how it is asked: what both clients are told.

    Args:
        url: ``http://host:port``, or below a path.
        api_key: Sent with each request; None: the gateway asks for none. It is in no text of this object.
        timeout_s: A try's, seconds.
        tries: How often a request is sent at most.
        pause_s: Before the second try, seconds; doubled for each one after it, or what the gateway says.
        batch_events: Events a request; halved where the gateway takes fewer.
        batch_bytes: Bytes a request, about.
        batch_actuals: Actuals a request.
    """

    url: str
    api_key: str | None = field(default=None, repr=False, kw_only=True)
    timeout_s: float = 5.0
    tries: int = 5
    pause_s: float = 0.1
    batch_events: int = 500
    batch_bytes: int = 900_000
    batch_actuals: int = 1_000

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self._calls = Calls(self.url, tries=self.tries, pause_s=self.pause_s)


def headers(api_key: str | None) -> dict[str, str]:
    """What each request carries."""
    found = {"Content-Type": "application/json"}
    return found if api_key is None else {**found, "Authorization": f"Bearer {api_key}"}


def _batches(events: Iterable[Mapping[str, Any]], most: int, most_bytes: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for event in events:
        text = orjson.dumps(event, option=_NUMPY_TOO)
        if batch and (len(batch) == most or size + len(text) > most_bytes):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text) + 1
    if batch:
        yield batch


def _understood(request: str, reply: httpx.Response) -> dict[str, Any]:
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
