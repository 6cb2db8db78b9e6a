"""The OpenAPI document, and what /docs shows: every route with its body, its answers and examples that work here."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pyarrow as pa
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from deployments.access import ROUTES
from deployments.answer_schemas import SCHEMAS, Document, many, ref
from deployments.gateway import Api
from deployments.http import JSON
from deployments.open_inference import PREFIX, OpenInference
from heliostat.models.definitions import Definitions, ModelSpec
from heliostat.serving.open_inference import ENTITY, HEADER_LENGTH, OUTPUTS

DESCRIPTION = """
Predictions from features that events have just changed.

Every error is `{"error": code, "message": …, "fix" or "known": …}`; below `/v2` it is `{"error": message}`, as the
Open Inference Protocol has it. `503` comes with `Retry-After`.
"""

_BYTES = "application/octet-stream"
_REASONS = {
    400: "The body can't be read",
    401: "No API key, or none that is valid",
    403: "The API key doesn't allow this; or, without keys, the request isn't the machine's own",
    404: "There is no such model, view, source or version, or nothing serves",
    408: "The body didn't arrive in time",
    409: "Another version answers",
    413: "The body, or what it asks for, is too large",
    422: "A field, or a part of the path, is wrong",
    503: "Too many requests, or a store is down: try again after Retry-After seconds",
    504: "No answer in time",
}
_RETRY = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer", "minimum": 0}}}
_CHALLENGE = {"WWW-Authenticate": {"description": "How to send a key", "schema": {"type": "string"}}}
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
# Their routes come first.
_ASKED_MOST = ("/predict", "/models/{model}/predict")

_READ = (400, 408, 413, 422, 503)


class _Route(NamedTuple):
    """A route's documentation."""

    method: str
    path: str
    endpoint: Any
    answer: str
    example: Document
    statuses: tuple[int, ...] = ()
    request: Document | None = None
    also: tuple[tuple[int, str], ...] = ()
    """Answers of another status than 200 that are no errors."""
    content: tuple[str, ...] = (JSON,)


def add_routes(app: FastAPI, api: Api, inference: OpenInference, definitions: Definitions) -> None:
    """Add every route with its documentation.

    Args:
        app: Gets the routes.
        api: Answers them.
        inference: Answers those of the Open Inference Protocol.
        definitions: What the examples are made of.
    """
    model = next(iter(definitions.models.values()), None)
    asking = (*_READ, 404, 504)
    predictions = _predictions_example(model)
    events = _events_schema(definitions)
    routes = [
        _Route("POST", "/predict", api.predict, "Predictions", predictions, asking, _predict_schema(model)),
        _Route(
            "POST",
            "/models/{model}/predict",
            api.predict_of,
            "Predictions",
            predictions,
            asking,
            _predict_schema(model),
        ),
        _Route(
            "POST",
            "/events",
            api.events,
            "EventsAnswer",
            _events_answer_example(definitions),
            (*_READ, 404),
            events,
            also=((422, "EventsAnswer"),),
        ),
        _Route(
            "POST", "/actuals", api.actuals, "ActualsAnswer", {"accepted": 1}, (*_READ, 404), _actuals_schema(model)
        ),
        _Route("GET", "/features", api.list_features, "FeatureList", {"features": []}, (422, 503)),
        _Route(
            "GET",
            "/features/{view}/{entity:path}",
            api.features,
            "Features",
            _features_example(model),
            (404, 422, 503),
        ),
        _Route("GET", "/models", api.list_models, "ModelList", {"models": []}, (503,)),
        _Route(
            "GET",
            "/models/{model}/{version}",
            api.model_version,
            "ModelVersion",
            _version_example(model),
            (404, 422, 503),
        ),
        _Route("GET", "/healthz", api.healthz, "Alive", {"status": "ok"}),
        _Route("GET", "/readyz", api.readyz, "Ready", {"status": "ready"}, also=((503, "Ready"),)),
        *_inference_routes(inference, model),
    ]
    for route in routes:
        _add(app, route)
    # Serve looks for each request's route, one after the other, to name it in its metrics.
    app.router.routes.sort(key=lambda route: getattr(route, "path", None) not in _ASKED_MOST)
    app.openapi = lambda: _openapi(app, routes, definitions)  # type: ignore[method-assign] # the way that FastAPI names


def _inference_routes(inference: OpenInference, model: ModelSpec | None) -> list[_Route]:
    name = "churn" if model is None else model.name
    described = {
        "name": name,
        "versions": ["1"],
        "platform": "lightgbm",
        "inputs": [{"name": ENTITY, "datatype": "INT64", "shape": [-1]}],
        "optional_inputs": [],
        "outputs": [{"name": each, "datatype": datatype, "shape": [-1]} for each, datatype in OUTPUTS.items()],
    }
    ready = {"name": name, "ready": True}
    answer = {
        "model_name": name,
        "model_version": "1",
        "parameters": {"request_id": "5f0c8a", "logged": True},
        "outputs": [{"name": "prediction", "datatype": "FP64", "shape": [1], "data": [0.25]}],
    }
    at = f"{PREFIX}/models/{{name}}"
    asking = (400, 404, 408, 413, 503, 504)
    asked = _infer_schema(model)
    not_ready = ((503, "V2ModelReady"),)
    return [
        _Route(
            "GET",
            PREFIX,
            inference.server,
            "V2Server",
            {"name": "heliostat", "version": "1", "extensions": ["binary_tensor_data"]},
        ),
        _Route("GET", f"{PREFIX}/health/live", inference.live, "V2Live", {"live": True}),
        _Route(
            "GET", f"{PREFIX}/health/ready", inference.ready, "V2Ready", {"ready": True}, also=((503, "V2Ready"),)
        ),
        _Route("GET", at, inference.model, "V2Model", described, (404, 503)),
        _Route("GET", f"{at}/versions/{{version}}", inference.model_version, "V2Model", described, (404, 409, 503)),
        _Route("GET", f"{at}/ready", inference.model_ready, "V2ModelReady", ready, (404,), also=not_ready),
        _Route(
            "GET",
            f"{at}/versions/{{version}}/ready",
            inference.model_version_ready,
            "V2ModelReady",
            ready,
            (404, 409),
            also=not_ready,
        ),
        _Route("POST", f"{at}/infer", inference.infer, "V2Answer", answer, asking, asked, content=(JSON, _BYTES)),
        _Route(
            "POST",
            f"{at}/versions/{{version}}/infer",
            inference.infer_version,
            "V2Answer",
            answer,
            (*asking, 409),
            asked,
            content=(JSON, _BYTES),
        ),
    ]


def _add(app: FastAPI, route: _Route) -> None:
    error = "V2Error" if route.path.startswith(PREFIX) else "Error"
    answers: dict[int | str, Document] = {}
    scope = ROUTES[f"{route.method} {route.path}"]
    refused = () if scope is None else (401, 403)
    for status in sorted({*route.statuses, *refused, *(status for status, _ in route.also)}):
        kinds = [ref(name) for at, name in route.also if at == status]
        if status in (*route.statuses, *refused):
            kinds.append(ref(error))
        answers[status] = {
            "description": _REASONS[status],
            "content": {JSON: {"schema": kinds[0] if len(kinds) == 1 else {"anyOf": kinds}}},
        }
        if status == 503:
            answers[status]["headers"] = _RETRY
        if status == 401:
            answers[status]["headers"] = _CHALLENGE
    answers[200] = {
        "description": SCHEMAS[route.answer]["description"],
        "content": {JSON: {"schema": ref(route.answer)}},
    }
    if _BYTES in route.content:
        length = {"description": "Bytes of JSON before those of tensors", "schema": {"type": "integer"}}
        answers[200]["headers"] = {HEADER_LENGTH: length}
        answers[200]["content"][_BYTES] = {"schema": {"type": "string", "format": "binary"}}
    extra: Document = {}
    if scope is not None:
        extra["description"] = f"{inspect.getdoc(route.endpoint)}\n\nScope: `{scope}`."
        extra["security"] = [{each: []} for each in _SECURITY]
    if route.request is not None:
        schema = {name: value for name, value in route.request.items() if name != "example"}
        content: Document = {JSON: {"schema": schema}}
        if _BYTES in route.content:
            content[_BYTES] = {"schema": {"type": "string", "format": "binary"}}
        extra["requestBody"] = {"required": True, "content": content}
    app.add_api_route(
        route.path, route.endpoint, methods=[route.method], responses=answers, openapi_extra=extra or None
    )


def _openapi(app: FastAPI, routes: list[_Route], definitions: Definitions) -> Document:
    """FastAPI's document, with components of our own, and examples in the paths."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
        document["components"] = {"schemas": SCHEMAS, "securitySchemes": _SECURITY}
        model = next(iter(definitions.models.values()), None)
        view = next(iter(definitions.views.values()), None)
        examples: Document = {"version": "1", "entity": "1", "search": ""}
        examples |= {} if model is None else {"model": model.name, "name": model.name}
        examples |= {} if view is None else {"view": view.name}
        for route in routes:  # FastAPI leaves null out of what it is given
            operation = document["paths"][route.path.replace(":path", "")][route.method.lower()]
            operation["responses"]["200"]["content"][JSON]["example"] = route.example
            if route.request is not None:
                operation["requestBody"]["content"][JSON]["example"] = route.request["example"]
        for path in document["paths"].values():
            for operation in path.values():
                for parameter in operation.get("parameters", ()):
                    if parameter["name"] in examples:
                        parameter["example"] = examples[parameter["name"]]
                # FastAPI documents one for every path with a parameter, whether a text can be wrong or not.
                wrong = operation["responses"].get("422", {}).get("content", {}).get(JSON, {}).get("schema", {})
                if "HTTPValidationError" in str(wrong):
                    del operation["responses"]["422"]
        app.openapi_schema = document
    return app.openapi_schema


def _key_schema(model: ModelSpec | None) -> Document:
    if model is None:
        return {"oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "object"}]}
    types: dict[str, Document] = {
        "int64": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        "string": {"type": "string", "minLength": 1},
    }
    keys = {name: types[dtype] for name, dtype in model.entity.keys.items()}
    parts = {"type": "object", "properties": keys, "required": [*keys], "additionalProperties": False}
    text = {"type": "string", "description": "The parts joined by |"}
    if len(keys) > 1:
        return {"anyOf": [parts, text]}
    return {"anyOf": [*keys.values(), {"type": "string", "description": "The same as text"}, parts]}


def _key_example(model: ModelSpec | None) -> Any:  # noqa: ANN401 - JSON
    if model is None:
        return 1
    examples = {"int64": 1, "string": "a"}
    keys = {name: examples[dtype] for name, dtype in model.entity.keys.items()}
    return next(iter(keys.values())) if len(keys) == 1 else keys


def _predictions_example(model: ModelSpec | None) -> Document:
    entity = {
        "entity_id": _key_example(model),
        "prediction": 0.25,
        "variant": "control",
        "model_version": 1,
        "prediction_id": "5f0c8a-0",
        "missing_features": [],
        "absent_views": [],
        "source": "model",
        "degraded": False,
        "fallback": None,
    }
    return {
        "model": "churn" if model is None else model.name,
        "model_version": 1,
        "predictions": [0.25],
        "latency_ms": 1.5,
        "request_id": "5f0c8a",
        "logged": True,
        "degraded": False,
        "fallback": None,
        "entities": [entity],
    }


def _events_answer_example(definitions: Definitions) -> Document:
    source = next(iter(definitions.sources), "purchases")
    counts = {"accepted": 1, "duplicates": 0, "late": 0, "rejected": 0}
    return {"source": source, **counts, "results": [{"event_id": 1, "status": "accepted"}]}


def _features_example(model: ModelSpec | None) -> Document:
    if model is None:
        return {}
    view = model.views[0]
    return {
        "view": view.ref,
        "entity": {name: {"int64": 1, "string": "a"}[dtype] for name, dtype in view.entity.keys.items()},
        "as_of": "2026-01-31T12:30:00Z",
        "absent": False,
        "features": dict.fromkeys(view.stored_features, 3.0),
        "needs_inputs": {},
    }


def _version_example(model: ModelSpec | None) -> Document:
    names = [] if model is None else [*model.feature_names]
    return {
        "model": "churn" if model is None else model.name,
        "version": 1,
        "status": "live",
        "aliases": ["production"],
        "created": "2026-01-31T12:30:00Z",
        "artifact": "9b2f…",
        "features": names,
        "categorical": [],
        "inputs": {} if model is None else dict(model.inputs),
        "views": [] if model is None else [each.ref for each in model.views],
        "metrics": {},
        "parameters": {},
        "lineage": {},
        "profile": None,
    }


_DATATYPES = [
    "BOOL",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "FP16",
    "FP32",
    "FP64",
]


def _infer_schema(model: ModelSpec | None) -> Document:
    integer = model is None or list(model.entity.keys.values()) == ["int64"]
    datatype, value = ("INT64", 1) if integer else ("BYTES", "a" if model and len(model.entity.keys) == 1 else "a|1")
    example: Document = {"inputs": [{"name": ENTITY, "datatype": datatype, "shape": [1], "data": [value]}]}
    for name, dtype in ({} if model is None else model.inputs).items():
        kind = {"float64": "FP64", "int64": "INT64", "bool": "BOOL"}[dtype]
        example["inputs"].append({"name": name, "datatype": kind, "shape": [1], "data": [_INPUT_EXAMPLES[dtype]]})
    parameters = {"type": ["object", "null"]}
    tensor = {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": {"type": "string", "description": f"{ENTITY}, an input, or a feature"},
            "datatype": {"enum": [*_DATATYPES, "BYTES"]},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "maxItems": 2},
            "data": {"type": "array", "items": {"type": ["number", "string", "boolean", "null", "array"]}},
            "parameters": parameters,
        },
    }
    output = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"enum": [*OUTPUTS]}, "parameters": parameters},
    }
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": ["string", "null"]},
            "parameters": parameters,
            "inputs": many(tensor),
            "outputs": {"anyOf": [many(output), {"type": "null"}]},
        },
        "example": example,
    }


def _predict_schema(model: ModelSpec | None) -> Document:
    example: Document = {"entity_ids": [_key_example(model)]}
    if model is not None:
        example = {"model": model.name, **example, "features": [{model.feature_names[0]: 3}]}
        if model.inputs:
            example["inputs"] = [{name: _INPUT_EXAMPLES[dtype] for name, dtype in model.inputs.items()}]
    value = {"type": ["number", "boolean", "string", "null"], "description": "A text is a category"}
    values = {"type": ["object", "null"], "additionalProperties": value}
    return {
        "type": "object",
        "required": ["entity_ids"],
        "additionalProperties": False,
        "properties": {
            "model": {"type": ["string", "null"], "description": "May be left out where one model is declared"},
            "entity_ids": {"type": "array", "minItems": 1, "items": _key_schema(model)},
            "features": {
                "description": "Values that replace stored ones: one object for each entity id, or by entity id",
                "anyOf": _by_row(values),
            },
            "inputs": _inputs_schema(model),
            "explain": {"type": ["boolean", "null"], "description": "Whether to say what each feature contributed"},
            "on_fallback": {
                "enum": ["answer", "error", None],
                "description": "error: 503 instead of an answer by a fallback",
            },
        },
        "example": example,
    }


_INPUT_EXAMPLES: Document = {"float64": 9.5, "int64": 3, "bool": True}
_INPUT_TYPES = {"float64": "number", "int64": "integer", "bool": "boolean"}


def _inputs_schema(model: ModelSpec | None) -> Document:
    types = {} if model is None else model.inputs
    item: Document = {
        "type": "object",
        "required": list(types),
        "additionalProperties": False,
        "properties": {name: {"type": [_INPUT_TYPES[dtype], "null"]} for name, dtype in types.items()},
    }
    needed = f"Model {model.name} needs {', '.join(types)}" if model and types else "This model needs none"
    return {
        "description": "What derived features take from the request, all of it for every entity: one object for "
        f"each entity id, or by entity id. {needed}; `GET /models` says what each one needs",
        "anyOf": _by_row(item if types else {**item, "type": ["object", "null"]}),
    }


def _by_row(item: Document) -> list[Document]:
    return [many(item), {"type": "object", "additionalProperties": item}, {"type": "null"}]


def _events_schema(definitions: Definitions) -> Document:
    source = next(iter(definitions.sources.values()), None)
    event: Document = {"type": "object"}
    example: Document = {"source": "purchases", "events": []}
    if source is not None:
        needed = {source.event_id, source.event_time, *(name for each in source.entities for name in each.keys)}
        needed |= {field.name for field in source.schema if not field.nullable}
        event["properties"] = {
            field.name: _field_schema(field.type)
            if field.name in needed
            else {"anyOf": [_field_schema(field.type), {"type": "null"}]}
            for field in source.given_schema
        }
        event["required"] = [field.name for field in source.given_schema if field.name in needed]
        example = {
            "source": source.name,
            "events": [{field.name: _field_example(field.type) for field in source.given_schema}],
        }
    return {
        "type": "object",
        "required": ["source", "events"],
        "additionalProperties": False,
        "properties": {"source": {"type": "string"}, "events": {"anyOf": [event, {**many(event), "minItems": 1}]}},
        "example": example,
    }


def _actuals_schema(model: ModelSpec | None) -> Document:
    by_id = {"prediction_id": {"type": "string"}, "value": {"type": ["number", "boolean"]}}
    by_entity = {
        "entity_id": _key_schema(model),
        "as_of": {"type": "string", "format": "date-time"},
        "value": {"type": ["number", "boolean"]},
    }
    actual = {
        "anyOf": [
            {"type": "object", "properties": each, "required": [*each], "additionalProperties": False}
            for each in (by_id, by_entity)
        ]
    }
    return {
        "type": "object",
        "required": ["actuals"],
        "additionalProperties": False,
        "properties": {
            "model": {"type": ["string", "null"]},
            "actuals": {"anyOf": [actual, {**many(actual), "minItems": 1}]},
        },
        "example": {"actuals": [{"prediction_id": "5f0c…-0", "value": 1}]},
    }


def _field_schema(dtype: pa.DataType) -> Document:
    if pa.types.is_boolean(dtype):
        return {"type": "boolean"}
    if pa.types.is_integer(dtype):
        return {"type": "integer"}
    if pa.types.is_floating(dtype):
        return {"type": "number"}
    return {"type": "string", "format": "date-time"} if pa.types.is_timestamp(dtype) else {"type": "string"}


def _field_example(dtype: pa.DataType) -> Any:  # noqa: ANN401 - JSON
    schema = _field_schema(dtype)
    if "format" in schema:
        return "2026-01-31T12:30:00Z"
    return {"boolean": True, "integer": 1, "number": 9.5, "string": "a"}[schema["type"]]
