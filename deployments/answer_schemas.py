"""What routes answer, as JSON schemas: the components of the OpenAPI document. Pure data.

Objects are open: a later release may say more. What is `required` is always there.
"""

from __future__ import annotations

from typing import Any, Final

from heliostat.serving.breaker import State
from heliostat.serving.fallback import Rung
from heliostat.serving.open_inference import OUTPUTS

Document = dict[str, Any]

_TEXT: Final[Document] = {"type": "string"}
_NUMBER: Final[Document] = {"type": "number"}
_COUNT: Final[Document] = {"type": "integer", "minimum": 0}
_YES_OR_NO: Final[Document] = {"type": "boolean"}
_NAMES: Final[Document] = {"type": "array", "items": _TEXT}


def ref(name: str) -> Document:
    """A reference to a component."""
    return {"$ref": f"#/components/schemas/{name}"}


def many(item: Document) -> Document:
    """A list."""
    return {"type": "array", "items": item}


def _object(about: str, /, optional: Document | None = None, **required: Document) -> Document:
    return {
        "type": "object",
        "description": about,
        "required": list(required),
        "properties": {**required, **(optional or {})},
    }


def _or_null(schema: Document) -> Document:
    return {"anyOf": [schema, {"type": "null"}]}


def _map(values: Document) -> Document:
    return {"type": "object", "additionalProperties": values}


SCHEMAS: Final[Document] = {
    "Error": _object(
        "What went wrong, and what exists or what to do",
        {"known": _NAMES, "fix": _TEXT},
        error={**_TEXT, "description": "A code that stays the same", "examples": ["unknown_model"]},
        message=_TEXT,
    ),
    "Explanation": _object(
        "What made a prediction: base_value and contributions add up to raw_score",
        contributions={**_map(_NUMBER), "description": "By feature, on the raw scale of the version that answered"},
        base_value=_NUMBER,
        raw_score=_NUMBER,
        scale={"enum": ["log-odds", "log", "square root", "value"]},
        prediction={**_TEXT, "description": "The prediction as a formula of raw_score"},
    ),
    "Prediction": _object(
        "The prediction for one entity",
        {
            "explanation": {**_or_null(ref("Explanation")), "description": "If it was asked for"},
            "unexplained": {**_or_null(_TEXT), "description": "Why there is no explanation"},
            "features_from": {**_or_null(_TEXT), "description": "Where degraded: what stood in for stored features"},
            "fallback_age_s": {**_or_null(_NUMBER), "description": "Where degraded: how old that is, if it is known"},
        },
        entity_id={"type": ["integer", "string", "object"], "description": "As the request wrote it"},
        prediction=_NUMBER,
        variant=_TEXT,
        model_version={"type": "integer", "minimum": 1},
        prediction_id={**_TEXT, "description": "Its name in the prediction log, for `POST /actuals`"},
        missing_features={**_NAMES, "description": "Features that were null"},
        absent_views={**_NAMES, "description": "Views that hold nothing about the entity"},
        source={"enum": ["model", "fallback"]},
        degraded={**_YES_OR_NO, "description": "Whether a fallback answered"},
        fallback={**_or_null({"enum": list(Rung)}), "description": "Which rung of the ladder answered, if one did"},
    ),
    "Predictions": _object(
        "One prediction an entity, in the request's order",
        model=_TEXT,
        model_version={"type": "integer", "minimum": 1},
        predictions=many(_NUMBER),
        latency_ms=_NUMBER,
        request_id=_TEXT,
        logged={**_YES_OR_NO, "description": "Whether they are durable in the prediction log"},
        degraded={**_YES_OR_NO, "description": "Whether a fallback answered for some entity"},
        fallback={**_or_null({"enum": list(Rung)}), "description": "The furthest rung that answered for one"},
        entities=many(ref("Prediction")),
    ),
    "EventsAnswer": _object(
        "What became of events, one result each",
        source=_TEXT,
        accepted=_COUNT,
        duplicates=_COUNT,
        late=_COUNT,
        rejected=_COUNT,
        results=many(
            _object(
                "What became of one event",
                {"reason": _TEXT},
                event_id={"type": ["integer", "string", "null"]},
                status={"enum": ["accepted", "duplicate", "late", "rejected"]},
            )
        ),
    ),
    "ActualsAnswer": _object("How many were taken", accepted=_COUNT),
    "Features": _object(
        "The online features of one entity",
        view=_TEXT,
        entity=_map({"type": ["integer", "string"]}),
        as_of={**_TEXT, "format": "date-time"},
        absent=_YES_OR_NO,
        features=_map({"type": ["number", "string", "null"]}),
        needs_inputs={**_map(_NAMES), "description": "Features that only a request can give, and of what"},
    ),
    "FeatureList": _object(
        "Registered features, of all versions of views",
        features=many(
            _object(
                "One feature of one version of a view",
                name=_TEXT,
                ref=_TEXT,
                view=_TEXT,
                version=_COUNT,
                type=_TEXT,
                function=_TEXT,
                description=_TEXT,
                tags=_map({}),
                owner=_TEXT,
                entity=_TEXT,
                source=_TEXT,
                columns=_NAMES,
                request=_NAMES,
                created=_TEXT,
                used_by=_NAMES,
                versions=many({"type": ["integer", "string"]}),
            )
        ),
    ),
    "Route": _object(
        "Which versions of a model serve, and whom",
        model=_TEXT,
        revision={"type": "integer", "minimum": 1},
        salt=_TEXT,
        coverage=_NUMBER,
        variants=many(_object("One arm", name=_TEXT, version={"type": "integer", "minimum": 1}, weight=_NUMBER)),
        shadow=many({"type": "integer", "minimum": 1}),
    ),
    "ModelList": _object(
        "The declared models",
        models=many(
            _object(
                "One model",
                model=_TEXT,
                description=_TEXT,
                entity={"type": "object"},
                inputs=_map(_TEXT),
                serving=_or_null(ref("Route")),
                versions=many(_object("One version", version={"type": "integer"}, status=_TEXT, aliases=_NAMES)),
            )
        ),
    ),
    "ModelVersion": _object(
        "One version: features, metrics, lineage",
        model=_TEXT,
        version={"type": "integer", "minimum": 1},
        status={"enum": ["candidate", "live", "retired"]},
        aliases=_NAMES,
        created={**_TEXT, "format": "date-time"},
        artifact=_TEXT,
        features=_NAMES,
        categorical=_NAMES,
        inputs=_map(_TEXT),
        views=_NAMES,
        metrics={"type": "object"},
        parameters={"type": "object"},
        lineage={"type": "object"},
        profile=_or_null(_TEXT),
    ),
    "Alive": _object("The process runs", status={"const": "ok"}),
    "Ready": _object(
        "Whether requests can be answered the normal way",
        {"problems": _map(_TEXT), "breakers": _map({"enum": list(State)})},
        status={"enum": ["ready", "not ready"]},
    ),
    "V2Error": _object("What went wrong", error=_TEXT),
    "V2Server": _object("What the server is", name=_TEXT, version=_TEXT, extensions=_NAMES),
    "V2Live": _object("Whether the process runs", live=_YES_OR_NO),
    "V2Ready": _object("Whether all models can be asked", ready=_YES_OR_NO),
    "V2ModelReady": _object("Whether a model can be asked", name=_TEXT, ready=_YES_OR_NO),
    "V2TensorMetadata": _object("What a tensor is", name=_TEXT, datatype=_TEXT, shape=many({"type": "integer"})),
    "V2Model": _object(
        "A model's tensors",
        name=_TEXT,
        versions=_NAMES,
        platform=_TEXT,
        inputs=many(ref("V2TensorMetadata")),
        optional_inputs=many(ref("V2TensorMetadata")),
        outputs=many(ref("V2TensorMetadata")),
    ),
    "V2Answer": _object(
        "The answer's tensors, a row an entity",
        {"id": {**_TEXT, "description": "The request's"}},
        model_name=_TEXT,
        model_version=_TEXT,
        parameters=_object("About the answer", request_id=_TEXT, logged=_YES_OR_NO),
        outputs=many(
            _object(
                "One tensor",
                {
                    "data": {"type": "array"},
                    "parameters": _object("Where its bytes are behind the JSON", binary_data_size=_COUNT),
                },
                name={"enum": list(OUTPUTS)},
                datatype=_TEXT,
                shape=many(_COUNT),
            )
        ),
    ),
}
