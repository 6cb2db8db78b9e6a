"""What the HTTP ingress' routes do: predictions, events, actuals, features, models, health.

It knows nothing of Ray: `deployments.application` makes an ASGI application of it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope

from deployments.access import forced_variant
from deployments.http import RETRY_AFTER, JsonBody, json_response, read_body, unless_gone
from heliostat.clock import Clock, format_instant
from heliostat.errors import HeliostatError, StorageError, TooManyEventsError, UnknownAliasError
from heliostat.experiments.assignment import RoutingDocument
from heliostat.features.categories import CategoryDictionary
from heliostat.features.metadata import FeatureMetadata
from heliostat.ingestion.intake import EventResult, Intake
from heliostat.models.definitions import Definitions, ModelSpec
from heliostat.models.registry import ModelRegistry, ModelVersion
from heliostat.serving.access import KeyRing, caller_of
from heliostat.serving.access import Scope as AccessScope
from heliostat.serving.answers import PredictAnswer
from heliostat.serving.breaker import Breakers
from heliostat.serving.coalescing import Coalescer
from heliostat.serving.lookup import FeatureReaders
from heliostat.serving.predictor import Predictor
from heliostat.serving.requests import parse_actuals, parse_events, parse_predict
from heliostat.serving.telemetry import Meter
from heliostat.settings import Settings
from heliostat.storage.online_store import AsyncOnlineStore
from heliostat.storage.stream_entries import actual_record
from heliostat.storage.streams import AsyncStreams
from heliostat.timers import Limits

_logger = logging.getLogger("heliostat.gateway")

_READY_FOR_S = 1.0
# A prediction that takes longer than this is given up if its client has gone.
_WATCHED_AFTER_S = 0.2
# Checking events is work for the processor: predictions get their turn between two parts of a large request.
_EVENTS_AT_ONCE = 100


EventCoalescer = Coalescer[list[Any], list[EventResult]]


@dataclass(frozen=True, eq=False)
class Parts:
    """What the routes work with.

    Attributes:
        settings: Limits.
        definitions: What is declared.
        clock: Tells now.
        predictor: Answers predictions.
        readers: Plans of feature reads.
        store: The online store.
        streams: Where actuals go.
        intake: Takes events in.
        categories: Tells the texts of categorical features.
        models: Registered versions.
        metadata: Registered features whose metadata hold all words of a text; blocks.
        route: A model's current routing document; blocks.
        meter: Counts.
        keys: Knows the API keys; None: this machine's requests need none, and others aren't answered.
        breakers: Say what isn't asked now, since it failed.
        close: Lets go of all of this, when the application is shut down.
    """

    settings: Settings
    definitions: Definitions
    clock: Clock
    predictor: Predictor
    readers: FeatureReaders
    store: AsyncOnlineStore
    streams: AsyncStreams
    intake: Intake
    categories: CategoryDictionary
    models: ModelRegistry
    metadata: Callable[[str], tuple[FeatureMetadata, ...]]
    route: Callable[[str], RoutingDocument | None]
    meter: Meter
    keys: KeyRing | None
    breakers: Breakers
    close: Callable[[], Awaitable[None]]


class Api:
    """What the routes do.

    Args:
        parts: What they work with.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._limits = parts.settings.serving
        self._body_limits, self._patience = Limits(self._limits.body_timeout_s), Limits(_WATCHED_AFTER_S)
        self._overridable: dict[str, frozenset[str]] = {}
        self._intakes: dict[str, EventCoalescer] = {}
        self._checked_at = -math.inf
        self._checking = asyncio.Lock()
        self._problems: dict[str, str] = {}
        parts.meter.watch(self._lines)

    async def predict(self, request: Request) -> Response:
        """Predictions for entities, by the version that serves each of them."""
        return await self.answer_predict(request.scope, request.receive)

    async def predict_of(self, request: Request, model: str) -> Response:
        """As ``POST /predict``, with the model's name in the path."""
        return await self.answer_predict(request.scope, request.receive, model)

    async def answer_predict(self, scope: Scope, receive: Receive, model: str | None = None) -> Response:
        """As `predict`, for whoever has no request object."""
        begin = time.perf_counter()
        variant = forced_variant(scope)
        body = await self.body(scope, receive)
        answer = await self.predictions(receive, body, model, variant)
        return JsonBody(answer.to_json((time.perf_counter() - begin) * 1e3))

    async def predictions(
        self, receive: Receive, body: bytes | dict[str, Any], model: str | None, variant: str | None
    ) -> PredictAnswer:
        """What the body of a prediction request asks for, counted; given up when its client has gone.

        Args:
            receive: Has given the body.
            body: As it is, or read.
            model: The path's; None: it names none.
            variant: The one that is forced; None: as assigned.
        """
        begin = time.perf_counter()
        asked = parse_predict(
            body,
            self._parts.definitions,
            overridable=self.overridable_of,
            max_entities=self._limits.max_entities_per_request,
            model=model,
            variant=variant,
        )
        self._parts.meter.of(asked.model).parsed((time.perf_counter() - begin) * 1e3)
        return await unless_gone(receive, self._parts.predictor.predict(asked), self._patience)

    def overridable_of(self, spec: ModelSpec) -> frozenset[str]:
        """The features that a request for a model may give."""
        known = self._overridable.get(spec.name)
        if known is None:
            known = self._overridable[spec.name] = frozenset(self._parts.readers.of(spec.feature_names).overridable)
        return known

    async def events(self, request: Request) -> Response:
        """Take events in; the online features of their entities change at once. Wrong ones don't stop the others."""
        source, events = parse_events(await self.body(request.scope, request.receive))
        limit = self._parts.settings.ingestion.max_events_per_request
        if len(events) > limit:
            raise TooManyEventsError(len(events), limit)
        intake = self._intake_of(source)
        results: list[EventResult] = []
        for first in range(0, len(events), _EVENTS_AT_ONCE):
            results += await intake.submit(events[first : first + _EVENTS_AT_ONCE])
        counts = Counter(each.status for each in results)
        for status, number in counts.items():
            self._parts.meter.took_in(source, status, number)
        document = {
            "source": source,
            "accepted": counts["accepted"],
            "duplicates": counts["duplicate"],
            "late": counts["late"],
            "rejected": counts["rejected"],
            "results": [each.to_document() for each in results],
        }
        return json_response(document, 422 if counts["rejected"] == len(results) else 200)

    def _intake_of(self, source: str) -> EventCoalescer:
        """Takes a source's events: what several requests bring at once goes in as one batch."""
        known = self._intakes.get(source)
        if known is None:
            self._parts.definitions.source(source)  # an unknown one is refused
            known = self._intakes[source] = Coalescer(
                partial(self._take_in, source), max_weight=_EVENTS_AT_ONCE, weigh=len
            )
        return known

    def _lines(self) -> Iterator[tuple[str, int, int]]:
        for source, each in self._intakes.items():
            yield f"events {source}", each.waiting, each.in_flight

    async def _take_in(self, source: str, requests: list[list[Any]]) -> list[list[EventResult] | Exception]:
        self._parts.meter.batch(f"events {source}", requests=len(requests), rows=sum(map(len, requests)))
        try:
            results = iter(await self._parts.intake.asubmit(source, list(chain.from_iterable(requests))))
        except StorageError:
            raise
        except Exception:
            if len(requests) == 1:
                raise
            # It was raised before anything was taken, and one request's fault is no other's.
            return [await self._take_alone(source, each) for each in requests]
        return [list(islice(results, len(each))) for each in requests]

    async def _take_alone(self, source: str, events: list[Any]) -> list[EventResult] | Exception:
        try:
            return await self._parts.intake.asubmit(source, events)
        except Exception as error:  # noqa: BLE001 - it belongs to the request that brought them
            return error

    async def close(self) -> None:
        """Answer what waits."""
        for each in self._intakes.values():
            await each.close()

    async def actuals(self, request: Request) -> Response:
        """Report what became of predictions."""
        body = await self.body(request.scope, request.receive)
        limit = self._limits.max_entities_per_request
        actuals = parse_actuals(body, self._parts.definitions, max_actuals=limit)
        now_us = self._parts.clock.now_us()
        records = [
            actual_record(
                model=each.model,
                value=each.value,
                at_us=now_us,
                prediction_id=each.prediction_id,
                entity=each.entity,
                as_of_us=each.as_of_us,
            )
            for each in actuals
        ]
        await self._parts.streams.append("actuals", records)
        return json_response({"accepted": len(records)})

    async def body(self, scope: Scope, receive: Receive) -> bytes:
        """A request's body, within the settings' limits."""
        return await read_body(scope, receive, self._limits.max_body_bytes, self._body_limits)

    async def features(self, view: str, entity: str) -> Response:
        """The online features of one entity, as a request at this instant would see them."""
        declared = self._parts.definitions.view(view)
        text = declared.entity.text(entity)
        stored = declared.stored_features
        reader = self._parts.readers.of(tuple(declared.pinned[name].name for name in stored))
        now_us = self._parts.clock.now_us()
        batch, _ = await reader.aread(self._parts.store, [text], as_of_us=now_us)
        values: dict[str, float | str] = dict(zip(stored, batch.matrix[0].tolist(), strict=True))
        for name in declared.categorical:
            codes = batch.matrix[0, [stored.index(name)]]
            (known,) = await asyncio.to_thread(self._parts.categories.texts, declared, name, codes)
            values[name] = values[name] if known is None else known
        needing = {name: declared.request_of([name]) for name in declared.feature_names if name not in stored}
        return json_response(
            {
                "view": declared.ref,
                "entity": declared.entity.parse(text),
                "as_of": format_instant(now_us),
                "absent": bool(batch.absent[0, 0]),
                "features": values,
                "needs_inputs": {name: list(needed) for name, needed in needing.items()},
            }
        )

    async def list_features(self, search: str = "") -> Response:
        """Registered features of all versions of views: meaning, lineage, owner, readers; ``search`` names words."""
        found = await asyncio.to_thread(self._parts.metadata, search)
        return json_response({"features": [each.to_document() for each in found]})

    async def list_models(self) -> Response:
        """The declared models: what serves, and which versions there are."""
        return json_response({"models": await asyncio.to_thread(self._describe_models)})

    def _describe_models(self) -> list[dict[str, Any]]:
        versions: dict[str, list[ModelVersion]] = {}
        for version in self._parts.models.list():
            versions.setdefault(version.model, []).append(version)
        return [
            {
                "model": spec.name,
                "description": spec.description,
                "entity": spec.entity.describe(),
                "inputs": dict(spec.inputs),
                "serving": None if (route := self._parts.route(spec.name)) is None else route.to_document(),
                "versions": [
                    {"version": each.version, "status": each.status, "aliases": list(each.aliases)}
                    for each in versions.get(spec.name, ())
                ],
            }
            for spec in self._parts.definitions.models.values()
        ]

    async def model_version(self, model: str, version: str) -> Response:
        """One version, by number, by alias or ``latest``: features, metrics, lineage."""
        spec = self._parts.definitions.model(model)
        selector = int(version) if version.isdecimal() else version
        found = await asyncio.to_thread(self._parts.models.get, spec.name, selector)
        return json_response(found.to_document())

    async def healthz(self) -> Response:
        """Whether the process runs."""
        return json_response({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """Whether requests can be answered the normal way: the store, the route and what serves answer.

        What is wrong, and the state of every circuit breaker, is told to those who may read.
        """
        problems = await self.problems()
        told: dict[str, Any] = {}
        if caller_of(request.scope).may(AccessScope.READ):
            told = {"breakers": self._parts.breakers.states(), **({"problems": problems} if problems else {})}
        if problems:
            return json_response({"status": "not ready", **told}, 503, RETRY_AFTER)
        return json_response({"status": "ready", **told})

    async def problems(self) -> dict[str, str]:
        """Why requests can't be answered the normal way, by part; looked for once a second at most."""
        async with self._checking:
            if time.monotonic() > self._checked_at + _READY_FOR_S:
                found = await self._look_for_problems()
                for name in found.keys() - self._problems.keys():
                    _logger.warning("not ready: %s: %s", name, found[name])
                self._problems = {name: error.public_text for name, error in found.items()}
                self._checked_at = time.monotonic()
        return self._problems

    async def _look_for_problems(self) -> dict[str, HeliostatError]:
        problems: dict[str, HeliostatError] = {}
        try:
            await self._parts.store.ping()
        except HeliostatError as error:
            problems["online_store"] = error
        look = self._parts.predictor.warm_up if problems else self._parts.predictor.check
        idle: dict[str, HeliostatError] = {}
        for model in self._parts.definitions.models:
            try:
                await look(model)
            except UnknownAliasError as error:
                idle[f"model {model}"] = error
            except HeliostatError as error:
                problems[f"model {model}"] = error
            except Exception as error:  # noqa: BLE001 - whatever a stage in another process does
                problems[f"model {model}"] = HeliostatError(f"{type(error).__name__}: {error}")
        # A model that was declared and not trained yet is no reason; if that is all of them, nobody can be answered.
        return idle if idle and len(idle) == len(self._parts.definitions.models) else problems
