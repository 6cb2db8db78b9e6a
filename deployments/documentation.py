"""What /docs shows: every route with its body, its answers and an example that fits the declarations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
from fastapi import FastAPI

from heliostat.models.definitions import Definitions, ModelSpec

if TYPE_CHECKING:
    from deployments.gateway import Api

DESCRIPTION = """
Predictions from features that events have just changed.

Every error is `{"error": code, "message": …, "fix" or "known": …}`. 400: the body is no JSON; 404: there is
no such model, view or version; 413: the body is too large; 422: a field is wrong; 503 with `Retry-After`: too
many requests, or a store is down; 504: no answer in time.
"""

Document = dict[str, Any]

_ERROR: Document = {
    "type": "object",
    "required": ["error", "message"],
    "properties": {
        "error": {"type": "string", "example": "unknown_model"},
        "message": {"type": "string"},
        "known": {"type": "array", "items": {"type": "string"}},
        "fix": {"type": "string"},
    },
}
_REASONS = {
    400: "The body is no JSON",
    404: "There is no such thing",
    413: "The body is too large",
    422: "A field is wrong",
    503: "Try again after Retry-After seconds",
    504: "No answer in time",
}


def add_routes(app: FastAPI, api: Api, definitions: Definitions) -> None:
    """Add every route with its documentation.

    Args:
        app: Gets the routes.
        api: Answers them.
        definitions: What the examples are made of.
    """
    model = next(iter(definitions.models.values()), None)
    _post(app, "/predict", api.predict, _predict_schema(model), (400, 404, 413, 422, 503, 504))
    _post(app, "/models/{model}/predict", api.predict_of, _predict_schema(model), (400, 404, 413, 422, 503, 504))
    _post(app, "/events", api.events, _events_schema(definitions), (400, 404, 413, 422, 503))
    _post(app, "/actuals", api.actuals, _actuals_schema(model), (400, 404, 413, 422, 503))
    _get(app, "/features", api.list_features, (503,))
    _get(app, "/features/{view}/{entity:path}", api.features, (404, 422, 503))
    _get(app, "/models", api.list_models, (503,))
    _get(app, "/models/{model}/{version}", api.model_version, (404, 503))
    _get(app, "/healthz", api.healthz, ())
    _get(app, "/readyz", api.readyz, (503,))


def _post(app: FastAPI, path: str, endpoint: Any, schema: Document, statuses: tuple[int, ...]) -> None:  # noqa: ANN401 - a bound method
    content = {"application/json": {"schema": schema}}
    extra = {"requestBody": {"required": True, "content": content}}
    app.add_api_route(path, endpoint, methods=["POST"], openapi_extra=extra, responses=_responses(statuses))


def _get(app: FastAPI, path: str, endpoint: Any, statuses: tuple[int, ...]) -> None:  # noqa: ANN401 - a bound method
    app.add_api_route(path, endpoint, methods=["GET"], responses=_responses(statuses))


def _responses(statuses: tuple[int, ...]) -> dict[int | str, Document]:
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": _REASONS[status], "content": content} for status in statuses}


def _key_schema(model: ModelSpec | None) -> Document:
    if model is None:
        return {"oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "object"}]}
    types = {"int64": {"type": "integer"}, "string": {"type": "string"}}
    keys = {name: types[dtype] for name, dtype in model.entity.keys.items()}
    return next(iter(keys.values())) if len(keys) == 1 else {"type": "object", "properties": keys}


def _key_example(model: ModelSpec | None) -> Any:  # noqa: ANN401 - JSON
    if model is None:
        return 1
    examples = {"int64": 1, "string": "a"}
    keys = {name: examples[dtype] for name, dtype in model.entity.keys.items()}
    return next(iter(keys.values())) if len(keys) == 1 else keys


def _predict_schema(model: ModelSpec | None) -> Document:
    example: Document = {"entity_ids": [_key_example(model)]}
    if model is not None:
        example = {"model": model.name, **example, "features": [{model.feature_names[0]: 3}]}
        if model.inputs:
            example["inputs"] = [{name: _INPUT_EXAMPLES[dtype] for name, dtype in model.inputs.items()}]
    values = {"type": "object", "additionalProperties": {"type": ["number", "boolean", "null"]}}
    return {
        "type": "object",
        "required": ["entity_ids"],
        "additionalProperties": False,
        "properties": {
            "model": {"type": "string", "description": "May be left out where one model is declared"},
            "entity_ids": {"type": "array", "minItems": 1, "items": _key_schema(model)},
            "features": {
                "description": "Values that replace stored ones: one object for each entity id, or by entity id",
                "oneOf": [{"type": "array", "items": values}, {"type": "object", "additionalProperties": values}],
            },
            "inputs": _inputs_schema(model),
            "explain": {"type": "boolean", "description": "Whether to say what each feature contributed"},
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
        "oneOf": [{"type": "array", "items": item}, {"type": "object", "additionalProperties": item}],
    }


def _events_schema(definitions: Definitions) -> Document:
    source = next(iter(definitions.sources.values()), None)
    event: Document = {"type": "object"}
    example: Document = {"source": "purchases", "events": []}
    if source is not None:
        event["properties"] = {field.name: _field_schema(field.type) for field in source.given_schema}
        example = {
            "source": source.name,
            "events": [{field.name: _field_example(field.type) for field in source.given_schema}],
        }
    return {
        "type": "object",
        "required": ["source", "events"],
        "additionalProperties": False,
        "properties": {"source": {"type": "string"}, "events": {"oneOf": [event, {"type": "array", "items": event}]}},
        "example": example,
    }


def _actuals_schema(model: ModelSpec | None) -> Document:
    by_id = {"prediction_id": {"type": "string"}, "value": {"type": "number"}}
    by_entity = {
        "entity_id": _key_schema(model),
        "as_of": {"type": "string", "format": "date-time"},
        "value": {"type": "number"},
    }
    actual = {"oneOf": [{"type": "object", "properties": each, "required": [*each]} for each in (by_id, by_entity)]}
    return {
        "type": "object",
        "required": ["actuals"],
        "additionalProperties": False,
        "properties": {
            "model": {"type": "string"},
            "actuals": {"oneOf": [actual, {"type": "array", "items": actual}]},
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
