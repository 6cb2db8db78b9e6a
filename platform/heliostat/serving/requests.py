"""What a request asks for. Pure.

A request is read by hand instead of by a schema library: it is on the hottest path, and the
messages can say what exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import orjson

from heliostat.clock import parse_instant_us
from heliostat.errors import InvalidFieldError, MalformedBodyError, MissingInputError, UnknownOverrideError
from heliostat.features.definitions import Entity
from heliostat.features.request import EXPECTED, RequestTypes, UniformOverrides, request_value
from heliostat.models.definitions import Definitions, ModelSpec
from heliostat.schema import text_code
from heliostat.tracing import CURRENT, Trace

_FIELDS = ("model", "entity_ids", "features", "inputs", "explain", "on_fallback")
_ON_FALLBACK = ("answer", "error")

Overrides = Mapping[int, Mapping[str, float]]
"""Values that a request gives instead of stored ones: position in the request -> feature -> value; NaN for null."""

Inputs = Mapping[int, Mapping[str, float]]
"""What a request brings for derived features: position in the request -> input -> value; NaN for null."""


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """One request for predictions.

    Attributes:
        model: The model's name.
        entities: Entity keys as text, in the request's order.
        entity_ids: The same as the client wrote them.
        overrides: Feature values that the client gives; NaN for null.
        inputs: What derived features take from the request: all that the model needs, for every entity.
        explain: Whether the answer says what each feature contributed.
        strict: Whether an error is wanted instead of an answer by a fallback.
        variant: The variant that serves everybody in this request, whoever they are assigned to; None: as assigned.
        trace: What it belongs to, and when it arrived; by default that of the task which makes it.
    """

    model: str
    entities: tuple[str, ...]
    entity_ids: tuple[Any, ...]
    overrides: Overrides = field(default_factory=dict)
    inputs: Inputs = field(default_factory=dict)
    explain: bool = False
    strict: bool = False
    variant: str | None = None
    trace: Trace | None = field(default_factory=CURRENT.get, compare=False, repr=False)


def parse_object(body: bytes | dict[str, Any], *, known: Sequence[str]) -> dict[str, Any]:
    """Read a JSON object, or take what was read, that has no other fields than the known ones.

    Raises:
        MalformedBodyError: If it is no JSON.
        InvalidFieldError: If it is no object, or has an unknown field.
    """
    try:
        document = orjson.loads(body) if isinstance(body, bytes) else body
    except orjson.JSONDecodeError as error:
        raise MalformedBodyError(str(error) if body else "it is empty") from None
    if not isinstance(document, dict):
        raise InvalidFieldError("the body", f"is {_kind(document)}", f"an object with the fields {', '.join(known)}")
    for name in document:
        if name not in known:
            raise InvalidFieldError(f"field {name!r}", "isn't known", f"one of: {', '.join(known)}")
    return document


def parse_predict(
    body: bytes | dict[str, Any],
    definitions: Definitions,
    *,
    overridable: Callable[[ModelSpec], AbstractSet[str]],
    max_entities: int,
    model: str | None = None,
    variant: str | None = None,
) -> PredictRequest:
    """Read the body of ``POST /predict``.

    Args:
        body: JSON, or what was read of it:
            ``{"model"?, "entity_ids": […], "features"?: […] or {…}, "inputs"?: […] or {…}, "explain"?,
            "on_fallback"?}``.
        definitions: What is declared.
        overridable: Names of the features that a request for a model may give.
        max_entities: Entities that one request may ask for.
        model: Its name, if the path says it: the body may repeat it, and name no other.
        variant: The variant that is forced, by whoever may.

    Raises:
        MalformedBodyError: If it is no JSON.
        InvalidFieldError: If a field has the wrong type, is missing or unknown.
        InvalidValueError: If an entity id doesn't fit the entity's key.
        UnknownModelError: If the model isn't declared, or none is named and several are.
        UnknownOverrideError: If a given feature isn't one of the model's.
        MissingInputError: If the model needs an input that an entity isn't given.
    """
    document = parse_object(body, known=_FIELDS)
    spec = _model_of(document, definitions, model)
    entity_ids = document.get("entity_ids")
    if not isinstance(entity_ids, list):
        problem = "is missing" if "entity_ids" not in document else f"is {_kind(entity_ids)}"
        raise InvalidFieldError("field 'entity_ids'", problem, 'a list such as [12, 13] or ["a", "b"]')
    if not entity_ids:
        raise InvalidFieldError("field 'entity_ids'", "is empty", "at least one entity id")
    if len(entity_ids) > max_entities:
        expected = (
            f"at most {max_entities} (serving.max_entities_per_request); send several requests, or batch_predict"
        )
        raise InvalidFieldError("field 'entity_ids'", f"has {len(entity_ids)} ids", expected)
    entities = entity_texts(spec.entity, entity_ids)
    given, brought = document.get("features"), document.get("inputs")
    overrides: Overrides = {}
    if given is not None:
        known = overridable(spec)
        overrides = _uniform(given, len(entities), known) or _by_row(
            "features", given, spec, entities, lambda each, at: _values(each, spec, known, at)
        )
    inputs = _required_inputs(brought, spec, entities)
    explain = document.get("explain")
    if explain is not None and not isinstance(explain, bool):
        raise InvalidFieldError("field 'explain'", f"is {_kind(explain)}", "true or false")
    on_fallback = document.get("on_fallback")
    if on_fallback is not None and on_fallback not in _ON_FALLBACK:
        raise InvalidFieldError("field 'on_fallback'", f"is {on_fallback!r}", "one of: answer, error")
    strict = on_fallback == "error"
    return PredictRequest(spec.name, entities, tuple(entity_ids), overrides, inputs, explain is True, strict, variant)


@dataclass(frozen=True, slots=True)
class Actual:
    """What became of a prediction, as somebody reports it.

    Attributes:
        model: The model's name.
        value: The label.
        prediction_id: Which prediction; None: the one about ``entity`` as of ``as_of_us``.
        entity: Entity key as text.
        as_of_us: Microseconds since the epoch.
    """

    model: str
    value: float
    prediction_id: str | None = None
    entity: str | None = None
    as_of_us: int | None = None


def parse_events(body: bytes) -> tuple[str, list[Any]]:
    """Read the body of ``POST /events``: the source's name, and events that nobody has looked at yet.

    Args:
        body: JSON: ``{"source": …, "events": {…} or [{…}, …]}``.

    Raises:
        MalformedBodyError: If it is no JSON.
        InvalidFieldError: If a field has the wrong type, is missing or unknown.
    """
    document = parse_object(body, known=("source", "events"))
    source = document.get("source")
    if not isinstance(source, str):
        problem = "is missing" if "source" not in document else f"is {_kind(source)}"
        raise InvalidFieldError("field 'source'", problem, "the name of an event source")
    return source, _one_or_many(document, "events")


def parse_actuals(body: bytes, definitions: Definitions, *, max_actuals: int) -> list[Actual]:
    """Read the body of ``POST /actuals``.

    Args:
        body: JSON: ``{"model"?, "actuals": {…} or [{…}, …]}``, each ``{"prediction_id", "value"}`` or
            ``{"entity_id", "as_of", "value"}``.
        definitions: What is declared.
        max_actuals: Actuals that one request may bring.

    Raises:
        MalformedBodyError: If it is no JSON.
        InvalidFieldError: If a field has the wrong type, is missing or unknown.
        InvalidValueError: If an entity id or an instant can't be read.
        UnknownModelError: If the model isn't declared, or none is named and several are.
    """
    document = parse_object(body, known=("model", "actuals"))
    spec = _model_of(document, definitions)
    given = _one_or_many(document, "actuals")
    if len(given) > max_actuals:
        expected = f"at most {max_actuals} (serving.max_entities_per_request)"
        raise InvalidFieldError("field 'actuals'", f"has {len(given)} items", expected)
    return [_actual(each, spec, f"actuals[{at}]") for at, each in enumerate(given)]


def _actual(given: object, spec: ModelSpec, where: str) -> Actual:
    if not isinstance(given, dict):
        expected = "an object with prediction_id (or entity_id and as_of) and value"
        raise InvalidFieldError(where, f"is {_kind(given)}", expected)
    value = given.get("value")
    if isinstance(value, bool):
        value = float(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        problem = "is missing" if "value" not in given else f"is {_kind(value)}"
        raise InvalidFieldError(f"{where}.value", problem, "a finite number, true or false")
    match given:
        case {"prediction_id": str(prediction_id), "value": _, **others} if not others:
            return Actual(spec.name, float(value), prediction_id=prediction_id)
        case {"entity_id": entity_id, "as_of": str(as_of), "value": _, **others} if not others:
            return Actual(
                spec.name, float(value), entity=spec.entity.text(entity_id), as_of_us=parse_instant_us(as_of)
            )
    problem = f"has the fields {', '.join(map(str, given))}"
    raise InvalidFieldError(where, problem, "prediction_id and value, or entity_id, as_of (a text) and value")


def _model_of(document: Mapping[str, Any], definitions: Definitions, path: str | None = None) -> ModelSpec:
    name = document.get("model")
    if name is not None and not isinstance(name, str):
        raise InvalidFieldError("field 'model'", f"is {_kind(name)}", "the name of a model")
    if path is None:
        return definitions.model(name)
    if name not in (None, path):
        raise InvalidFieldError("field 'model'", f"is {name!r}", f"{path!r}, as in the path, or nothing")
    return definitions.model(path)


def _one_or_many(document: Mapping[str, Any], name: str) -> list[Any]:
    given = document.get(name)
    if isinstance(given, dict):
        return [given]
    if not isinstance(given, list):
        problem = "is missing" if name not in document else f"is {_kind(given)}"
        raise InvalidFieldError(f"field {name!r}", problem, "an object, or a list of objects")
    if not given:
        raise InvalidFieldError(f"field {name!r}", "is empty", "at least one")
    return given


def entity_texts(entity: Entity, entity_ids: Sequence[Any]) -> tuple[str, ...]:
    """Entity keys as text.

    Raises:
        InvalidValueError: If an id doesn't fit the entity's key.
    """
    return tuple(entity.texts(entity_ids))


def _by_row(
    name: str,
    given: object,
    spec: ModelSpec,
    entities: Sequence[str],
    read: Callable[[object, str], Mapping[str, float]],
) -> dict[int, Mapping[str, float]]:
    """A field that says something about each entity: a list beside the entity ids, or an object by entity id."""
    if isinstance(given, dict):
        return _by_key(name, given, spec, entities, read)
    if not isinstance(given, list):
        expected = "a list with one object (or null) for each entity id, or an object by entity id"
        raise InvalidFieldError(f"field {name!r}", f"is {_kind(given)}", expected)
    if len(given) != len(entities):
        expected = f"one for each of the {len(entities)} entity ids (null for none)"
        raise InvalidFieldError(f"field {name!r}", f"has {len(given)} items", expected)
    return {at: read(each, f"{name}[{at}]") for at, each in enumerate(given) if each is not None and each != {}}


def _by_key(
    name: str,
    given: Mapping[str, Any],
    spec: ModelSpec,
    entities: Sequence[str],
    read: Callable[[object, str], Mapping[str, float]],
) -> dict[int, Mapping[str, float]]:
    places: dict[str, list[int]] = {}
    for at, text in enumerate(entities):
        places.setdefault(text, []).append(at)
    found: dict[int, Mapping[str, float]] = {}
    for key, each in given.items():
        text = spec.entity.text(key)
        if text not in places:
            raise InvalidFieldError(f"{name}[{key!r}]", "isn't among the entity ids", "only entities asked for")
        found.update(dict.fromkeys(places[text], read(each, f"{name}[{key!r}]")))
    return found


def _required_inputs(given: object, spec: ModelSpec, entities: Sequence[str]) -> Inputs:
    """What every entity is given, and nothing that the model doesn't need is missing."""
    needed = spec.inputs
    found: Inputs = {}
    if given is not None:
        found = _by_row("inputs", given, spec, entities, lambda each, at: _inputs(each, spec, needed, at))
    if not needed:
        return found
    for row, entity in enumerate(entities):
        missing = tuple(name for name in needed if name not in found.get(row, ()))
        if missing:
            raise MissingInputError(missing, f"model {spec.name!r}", f"field 'inputs' for entity {entity}")
    return found


def _inputs(given: object, spec: ModelSpec, needed: RequestTypes, where: str) -> dict[str, float]:
    if not isinstance(given, dict):
        raise InvalidFieldError(where, f"is {_kind(given)}", "an object of values by input")
    values: dict[str, float] = {}
    for name, value in given.items():
        if name not in needed:
            expected = f"what model {spec.name!r} takes: {', '.join(needed) or 'no inputs'}"
            raise InvalidFieldError(f"{where}.{name}", "isn't taken", expected)
        try:
            values[name] = request_value(value, needed[name])
        except ValueError:
            raise InvalidFieldError(f"{where}.{name}", f"is {_kind(value)}", EXPECTED[needed[name]]) from None
    return values


def _uniform(given: object, n: int, known: AbstractSet[str]) -> UniformOverrides | None:
    """The overrides, where all entities are given the same features as finite floats; None of anything else."""
    if isinstance(given, list) and len(given) == n and set(map(type, given)) == {dict}:
        given = UniformOverrides.of(given)
    if isinstance(given, UniformOverrides) and len(given) == n and known >= set(given.names):
        return given
    return None


def _values(given: object, spec: ModelSpec, known: AbstractSet[str], where: str) -> dict[str, float]:
    if not isinstance(given, dict):
        raise InvalidFieldError(where, f"is {_kind(given)}", "an object of values by feature")
    if given.keys() <= known and set(map(type, given.values())) == {float} and math.isfinite(sum(given.values())):
        return given  # as nearly all are
    values: dict[str, float] = {}
    for name, value in given.items():
        if name not in known:
            raise UnknownOverrideError(name, spec.name, tuple(known))
        if value is None:
            values[name] = math.nan
            continue
        if isinstance(value, str) and any(name in (each, each.split("__", 1)[1]) for each in spec.categorical):
            values[name] = text_code(value)
            continue
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidFieldError(f"{where}.{name}", f"is {_kind(value)}", "a finite number, true, false or null")
        values[name] = float(value)
    return values


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return names.get(type(value), "a number")
