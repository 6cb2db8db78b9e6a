"""What a gateway's answers are to a client, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from heliostat.errors import GatewayError

Document = Mapping[str, Any]


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

    @classmethod
    def read(cls, answer: Document, position: int, requests: int) -> Sent:
        """From an answer about events whose first one is at a position."""
        rejected = tuple(
            Rejected(position + at, each["event_id"], each["reason"])
            for at, each in enumerate(answer["results"])
            if each["status"] == "rejected"
        )
        return cls(answer["accepted"], answer["duplicates"], answer["late"], rejected, requests)


@dataclass(frozen=True)
class Explanation:
    """What made a prediction what it is.

    Attributes:
        contributions: By feature, on the raw scale; with ``base_value`` they add up to ``raw_score``.
        base_value: The raw score of nobody in particular.
        raw_score: What the model's trees added up to.
        scale: What a raw score is: ``log-odds``, ``log``, ``square root`` or ``value``.
        prediction: The prediction as a formula of ``raw_score``.
    """

    contributions: Mapping[str, float]
    base_value: float
    raw_score: float
    scale: str
    prediction: str

    @classmethod
    def read(cls, answer: Document) -> Explanation:
        """From a part of an answer."""
        return cls(
            answer["contributions"],
            answer["base_value"],
            answer["raw_score"],
            answer["scale"],
            answer["prediction"],
        )


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
        fallback: What answered instead of the variant's version; None: nothing did.
        explanation: If it was asked for and there is one.
        unexplained: Why there is none, if it was asked for.
    """

    entity_id: Any
    value: float
    prediction_id: str
    variant: str
    model_version: int
    source: Literal["model", "fallback"]
    missing_features: tuple[str, ...]
    absent_views: tuple[str, ...]
    fallback: str | None = None
    explanation: Explanation | None = None
    unexplained: str | None = None

    @classmethod
    def read(cls, answer: Document) -> Prediction:
        """From a part of an answer."""
        explanation = answer.get("explanation")
        return cls(
            entity_id=answer["entity_id"],
            value=answer["prediction"],
            prediction_id=answer["prediction_id"],
            variant=answer["variant"],
            model_version=answer["model_version"],
            source=answer["source"],
            missing_features=tuple(answer["missing_features"]),
            absent_views=tuple(answer["absent_views"]),
            fallback=answer["fallback"],
            explanation=None if explanation is None else Explanation.read(explanation),
            unexplained=answer.get("unexplained"),
        )


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

    @classmethod
    def read(cls, answer: Document) -> Predictions:
        """From an answer."""
        return cls(
            model=answer["model"],
            model_version=answer["model_version"],
            request_id=answer["request_id"],
            entities=tuple(Prediction.read(each) for each in answer["entities"]),
            logged=answer["logged"],
            latency_ms=answer["latency_ms"],
        )


@dataclass(frozen=True)
class Features:
    """The online features of one entity.

    Attributes:
        view: Reference of the view: ``name@version``.
        entity: Its key, by column.
        as_of: The instant they are of, ISO 8601.
        absent: Whether the view holds nothing about it.
        values: By feature; None for null, a text for a category.
    """

    view: str
    entity: Mapping[str, int | str]
    as_of: str
    absent: bool
    values: Mapping[str, float | str | None]

    @classmethod
    def read(cls, answer: Document) -> Features:
        """From an answer."""
        return cls(answer["view"], answer["entity"], answer["as_of"], answer["absent"], answer["features"])


@dataclass(frozen=True)
class Model:
    """A declared model.

    Attributes:
        name: Its name.
        description: One line.
        inputs: What a request for its predictions has to bring: type by name.
        serving: The share of entities that each version answers; empty if none serves.
        shadow: Versions that are scored and logged, but answer nobody.
        versions: All that are registered.
    """

    name: str
    description: str
    inputs: Mapping[str, str]
    serving: Mapping[int, float]
    shadow: tuple[int, ...]
    versions: tuple[int, ...]

    @classmethod
    def read(cls, answer: Document) -> Model:
        """From a part of an answer."""
        route = answer["serving"] or {"variants": [], "shadow": [], "coverage": 1.0}
        serving: dict[int, float] = {}
        for at, each in enumerate(route["variants"]):
            # Whoever isn't in the experiment gets the control.
            outside = 1.0 - route["coverage"] if at == 0 else 0.0
            share = each["weight"] * route["coverage"] + outside
            serving[each["version"]] = serving.get(each["version"], 0.0) + share
        return cls(
            name=answer["model"],
            description=answer["description"],
            inputs=answer["inputs"],
            serving=serving,
            shadow=tuple(route["shadow"]),
            versions=tuple(each["version"] for each in answer["versions"]),
        )


@dataclass(frozen=True)
class ModelVersion:
    """A registered version.

    Attributes:
        model: The model's name.
        version: 1, 2, …
        status: ``candidate``, ``live`` or ``retired``.
        aliases: Those that point at it.
        created: When it was registered, ISO 8601.
        features: Its features, in order.
        inputs: What a request has to bring: type by name.
        metrics: Figures from its evaluation.
        document: All that the gateway said.
    """

    model: str
    version: int
    status: str
    aliases: tuple[str, ...]
    created: str
    features: tuple[str, ...]
    inputs: Mapping[str, str]
    metrics: Mapping[str, Any]
    document: Document

    @classmethod
    def read(cls, answer: Document) -> ModelVersion:
        """From an answer."""
        return cls(
            model=answer["model"],
            version=answer["version"],
            status=answer["status"],
            aliases=tuple(answer["aliases"]),
            created=answer["created"],
            features=tuple(answer["features"]),
            inputs=answer["inputs"],
            metrics=answer["metrics"],
            document=answer,
        )
