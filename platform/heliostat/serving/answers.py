"""What prediction requests are answered with, column by column. Pure.

The entities of requests that are answered together are the rows of one `Predictions`; each request's
answer is a part of it. Nothing is made for each entity until the answer is written.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from heliostat.serving.fallback import FURTHER, Rung
from heliostat.storage.stream_entries import prediction_ids

try:
    from heliostat.serving import _writing
except ImportError:  # built without a compiler
    _writing = None  # type: ignore[assignment]

FloatArray = NDArray[np.float64]

FORCED = "forced:"
"""What the variants of forced answers begin with, so that they count for no variant of an experiment."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What made a prediction what it is.

    Attributes:
        contributions: By qualified feature, on the raw scale of the version that answered; with ``base_value``
            they add up to ``raw_score``.
        base_value: The raw score of nobody in particular.
        raw_score: What the booster said.
        scale: What a raw score is: ``log-odds``, ``log``, ``square root`` or ``value``.
        prediction: The prediction as a formula of ``raw_score``.
    """

    contributions: Mapping[str, float]
    base_value: float
    raw_score: float
    scale: str
    prediction: str

    def document(self) -> dict[str, Any]:
        """As the HTTP answer shows it."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(slots=True, eq=False)
class Predictions:
    """Predictions for some entities: one value an entity in each column.

    Attributes:
        scores: The predictions.
        versions: The model version that answered: the variant's, unless ``fallbacks`` says otherwise.
        fallbacks: Which rung of the ladder answered (see `heliostat.serving.fallback`); None for the normal way.
        vectors: What the model saw, shape ``(n_features,)`` each, in the order of the signature of the version
            that answered; one matrix where all versions have as many.
        missing: Features without a value (null) when the model was asked.
        variants: The variant that the entity is assigned to.
        absent: Views that hold nothing about the entity: their features are those of nobody.
        spared: What stood in for features, if something did; empty if for nobody.
        ages_s: How old what stood in is, seconds, if that is known; empty if for nobody.
        causes: Why something stood in (see `heliostat.serving.telemetry.CAUSES`); empty if for nobody.
    """

    scores: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    fallbacks: list[str | None] = field(default_factory=list)
    vectors: NDArray[np.float64] | list[NDArray[np.float64]] = field(default_factory=list)
    missing: list[tuple[str, ...]] = field(default_factory=list)
    variants: list[str] = field(default_factory=list)
    absent: list[tuple[str, ...]] = field(default_factory=list)
    spared: list[str | None] = field(default_factory=list)
    ages_s: list[float | None] = field(default_factory=list)
    causes: list[str | None] = field(default_factory=list)

    @classmethod
    def of(
        cls, scores: FloatArray, versions: list[int], rung: Rung | None, names: tuple[str, ...], matrix: FloatArray
    ) -> Self:
        """What versions of the same features, or what stood in for one, say of some rows.

        Args:
            scores: Shape ``(n,)``.
            versions: Which version, row by row.
            rung: What stood in; None for the normal way.
            names: The matrix's columns.
            matrix: The features that were used, shape ``(n, len(names))``, NaN where there was none.
        """
        n = len(matrix)
        nulls = np.isnan(matrix)
        missing: list[tuple[str, ...]] = [()] * n
        if nulls.any():
            missing = [tuple(itertools.compress(names, row)) for row in nulls.tolist()]
        return cls(scores.tolist(), versions, [rung] * n, matrix, missing)

    @classmethod
    def merged(cls, parts: Sequence[Self], rows: NDArray[np.intp]) -> Self:
        """Parts that are about some rows each, two or more in all, as one about all of them, in order.

        Args:
            parts: Without variants and absent views yet.
            rows: The rows of the parts, one part after the other.
        """
        order = np.argsort(rows)
        in_order = itemgetter(*order.tolist())

        def column(name: str) -> list[Any]:
            return list(in_order(list(itertools.chain.from_iterable(getattr(part, name) for part in parts))))

        spared = any(part.spared for part in parts)
        for part in parts if spared else ():
            part.spared = part.spared or [None] * len(part)
            part.ages_s = part.ages_s or [None] * len(part)
            part.causes = part.causes or [None] * len(part)
        one_matrix = len({part.vectors[0].shape for part in parts}) == 1
        return cls(
            column("scores"),
            column("versions"),
            column("fallbacks"),
            np.concatenate([part.vectors for part in parts])[order] if one_matrix else column("vectors"),
            column("missing"),
            spared=column("spared") if spared else [],
            ages_s=column("ages_s") if spared else [],
            causes=column("causes") if spared else [],
        )

    def __len__(self) -> int:
        return len(self.scores)

    def taken(self, rows: NDArray[np.intp]) -> Predictions:
        """Other rows: some of these, in any order, as often as wanted; two or more."""
        in_order = itemgetter(*rows.tolist())

        def column(values: list[Any]) -> list[Any]:
            return list(in_order(values)) if values else []

        return Predictions(
            column(self.scores),
            column(self.versions),
            column(self.fallbacks),
            self.vectors[rows] if isinstance(self.vectors, np.ndarray) else column(self.vectors),
            column(self.missing),
            column(self.variants),
            column(self.absent),
            column(self.spared),
            column(self.ages_s),
            column(self.causes),
        )

    def part(self, first: int, last: int) -> Predictions:
        """Some of the rows."""
        if first == 0 and last == len(self):
            return self
        return Predictions(
            self.scores[first:last],
            self.versions[first:last],
            self.fallbacks[first:last],
            self.vectors[first:last],
            self.missing[first:last],
            self.variants[first:last],
            self.absent[first:last],
            self.spared[first:last],
            self.ages_s[first:last],
            self.causes[first:last],
        )

    @property
    def furthest(self) -> str | None:
        """Of the rungs that answered, the one that is furthest from the normal way; None if none did."""
        rungs = [Rung(each) for each in set(self.fallbacks) if each is not None]
        return max(rungs, key=FURTHER.__getitem__, default=None)


class EntityAnswer(NamedTuple):
    """The prediction for one entity: a row of `Predictions`.

    Attributes:
        entity_id: As the client wrote it.
        score: The prediction.
        variant: The variant that the entity is assigned to.
        version: The model version that answered.
        prediction_id: Its name in the prediction log, for matching actuals.
        missing: Features without a value (null) when the model was asked.
        absent: Views that hold nothing about the entity.
        fallback: Which rung of the ladder answered; None for the normal way.
    """

    entity_id: Any
    score: float
    variant: str
    version: int
    prediction_id: str
    missing: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    fallback: str | None = None

    @property
    def source(self) -> str:
        """``model`` or ``fallback``."""
        return "model" if self.fallback is None else "fallback"


@dataclass(frozen=True, slots=True)
class PredictAnswer:
    """The answer to one request.

    Attributes:
        request_id: Its name in the prediction log.
        model: The model's name.
        version: The version that answered; the production one where several did.
        revision: The routing document's revision.
        entity_ids: As the client wrote them.
        predictions: One an entity, in the request's order.
        logged: Whether the predictions are durable.
        explanations: One an entity, or why there is none, as a text; None if nobody asked.
    """

    request_id: str
    model: str
    version: int
    revision: int
    entity_ids: tuple[Any, ...]
    predictions: Predictions
    logged: bool = True
    explanations: tuple[Explanation | str, ...] | None = None

    @property
    def entities(self) -> tuple[EntityAnswer, ...]:
        """The predictions row by row."""
        rows = self.predictions
        return tuple(
            map(
                EntityAnswer,
                self.entity_ids,
                rows.scores,
                rows.variants,
                rows.versions,
                prediction_ids(self.request_id, len(rows)),
                rows.missing,
                rows.absent,
                rows.fallbacks,
            )
        )

    def to_json(self, latency_ms: float) -> bytes:
        """`document` as JSON."""
        rows = self.predictions
        if _writing is None or self.explanations is not None or any(rows.fallbacks):
            return orjson.dumps(self.document(latency_ms))
        scores = orjson.dumps(rows.scores)
        columns = rows.variants, rows.versions, rows.missing, rows.absent
        entities = _writing.entities(orjson.dumps(self.entity_ids), scores, self.request_id, *columns, _frame)
        return orjson.dumps(self._told(latency_ms, orjson.Fragment(scores), orjson.Fragment(entities)))

    def document(self, latency_ms: float) -> dict[str, Any]:
        """As the HTTP answer shows it."""
        rows = self.predictions
        names = prediction_ids(self.request_id, len(rows))
        columns = rows.variants, rows.versions, names, rows.missing, rows.absent, rows.fallbacks
        entities = list(itertools.starmap(_entity, zip(self.entity_ids, rows.scores, *columns, strict=True)))
        if self.explanations is not None:
            for entity, each in zip(entities, self.explanations, strict=True):
                entity["explanation"] = each.document() if isinstance(each, Explanation) else None
                entity["unexplained"] = each if isinstance(each, str) else None
        furthest = rows.furthest if any(rows.fallbacks) else None
        if furthest is not None:
            ages = rows.ages_s or [None] * len(rows)
            for entity, spared, age_s in zip(entities, rows.spared or ages, ages, strict=True):
                entity["features_from"] = spared
                entity["fallback_age_s"] = age_s
        return self._told(latency_ms, rows.scores, entities, furthest)

    def _told(self, latency_ms: float, scores: Any, entities: Any, furthest: str | None = None) -> dict[str, Any]:  # noqa: ANN401 - or what orjson takes for it
        return {
            "model": self.model,
            "model_version": self.version,
            "predictions": scores,
            "latency_ms": round(latency_ms, 3),
            "request_id": self.request_id,
            "logged": self.logged,
            "degraded": furthest is not None,
            "fallback": furthest,
            "entities": entities,
        }


def _entity(
    entity_id: Any,  # noqa: ANN401 - as the client wrote it
    score: Any,  # noqa: ANN401 - a number, or what orjson takes for it
    variant: str,
    version: int,
    prediction_id: Any,  # noqa: ANN401 - a text, or what orjson takes for it
    missing: tuple[str, ...],
    absent: tuple[str, ...],
    fallback: str | None,
) -> dict[str, Any]:
    return {
        "entity_id": entity_id,
        "prediction": score,
        "variant": variant,
        "model_version": version,
        "prediction_id": prediction_id,
        "missing_features": missing,
        "absent_views": absent,
        "source": "model" if fallback is None else "fallback",
        "degraded": fallback is not None,
        "fallback": fallback,
    }


_GAP = orjson.Fragment(b"\0")  # which JSON never has


@lru_cache(maxsize=1_024)
def _frame(variant: str, version: int, missing: tuple[str, ...], absent: tuple[str, ...]) -> tuple[bytes, ...]:
    """The text around the id, the score and the name of an entity that a model answered."""
    return tuple(orjson.dumps(_entity(_GAP, _GAP, variant, version, _GAP, missing, absent, None)).split(b"\0"))
