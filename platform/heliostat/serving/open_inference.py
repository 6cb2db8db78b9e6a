"""The Open Inference Protocol, version 2: tensors in, tensors out, as JSON or as bytes after JSON. Pure.

A request for inference becomes the body of ``POST /predict`` and goes the same way from there: features are
looked up, variants assigned, predictions logged. Its tensors have a row an entity: ``entity_id`` says whose,
the others, each optional, what the request knows itself: an input of derived features, or a feature's value
that replaces the stored one.

Source: Open Inference Protocol, "REST protocol" and "binary tensor data extension".
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import NoneType
from typing import Any, Final, TypeGuard

import numpy as np
import orjson

from heliostat.errors import InvalidFieldError, MalformedBodyError
from heliostat.features.request import UniformOverrides
from heliostat.models.definitions import ModelSpec
from heliostat.serving.answers import PredictAnswer
from heliostat.storage.stream_entries import prediction_ids

ENTITY: Final = "entity_id"
"""The tensor that says whose prediction is asked for."""

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
"""The HTTP header that says how many bytes of a body are JSON, where tensors' bytes follow."""

BINARY_EXTENSION: Final = "binary_tensor_data"

_NUMPY: Final[Mapping[str, np.dtype[Any]]] = {
    name: np.dtype(code)
    for name, code in {
        "BOOL": "?",
        "INT8": "<i1",
        "INT16": "<i2",
        "INT32": "<i4",
        "INT64": "<i8",
        "UINT8": "<u1",
        "UINT16": "<u2",
        "UINT32": "<u4",
        "UINT64": "<u8",
        "FP16": "<f2",
        "FP32": "<f4",
        "FP64": "<f8",
    }.items()
}
_BYTES: Final = "BYTES"
_DATATYPES: Final = (*_NUMPY, _BYTES)
_LENGTH: Final = struct.Struct("<I")
_FITTING: Final[Mapping[str, AbstractSet[type]]] = {
    _BYTES: {str},
    **{name: {bool} if dtype.kind == "b" else {float, int} for name, dtype in _NUMPY.items() if dtype.kind in "bf"},
}
"""Types of Python all of whose values fit, by datatype, where that depends on the type alone."""
_LIMITS: Final[Mapping[str, tuple[int, int]]] = {
    name: (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)) for name, dtype in _NUMPY.items() if dtype.kind in "iu"
}
"""The least and the largest value of whole numbers, by datatype."""

_DTYPES: Final = {"float64": "FP64", "int64": "INT64", "bool": "BOOL"}

OUTPUTS: Final[Mapping[str, str]] = {
    "prediction": "FP64",
    "model_version": "INT64",
    "variant": _BYTES,
    "prediction_id": _BYTES,
    "fallback": _BYTES,
}
"""The tensors of an answer, and their datatypes. ``fallback`` is empty where the variant's version answered."""


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request for inference.

    Attributes:
        body: The same as a body of ``POST /predict``, read.
        request_id: The client's own id, which goes back with the answer.
        outputs: The tensors that are wanted, and whether as bytes.
    """

    body: dict[str, Any]
    request_id: str | None
    outputs: tuple[tuple[str, bool], ...]


# ── What there is ───────────────────────────────────────────────────────────────────


def server_document(version: str) -> dict[str, Any]:
    """What the server says of itself."""
    return {"name": "heliostat", "version": version, "extensions": [BINARY_EXTENSION]}


def model_document(spec: ModelSpec, versions: Sequence[int], overridable: Sequence[str]) -> dict[str, Any]:
    """What the server says of a model.

    Args:
        spec: The model.
        versions: Those that serve.
        overridable: Features that a request may give.
    """
    features = [name for name in overridable if "__" in name]
    return {
        "name": spec.name,
        "versions": [str(each) for each in versions],
        "platform": "lightgbm",
        "inputs": [
            _described(ENTITY, _entity_datatype(spec)),
            *(_described(name, _DTYPES[dtype]) for name, dtype in spec.inputs.items()),
        ],
        "optional_inputs": [_described(name, _BYTES if name in spec.categorical else "FP64") for name in features],
        "outputs": [_described(name, datatype) for name, datatype in OUTPUTS.items()],
    }


def _described(name: str, datatype: str) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [-1]}


def _entity_datatype(spec: ModelSpec) -> str:
    return "INT64" if list(spec.entity.keys.values()) == ["int64"] else _BYTES


# ── In ──────────────────────────────────────────────────────────────────────────────


def parse_infer(body: bytes, header_length: int | None, spec: ModelSpec) -> InferRequest:
    """Read the body of ``POST /v2/models/{name}/infer``.

    Args:
        body: JSON, and behind it the bytes of those tensors that are sent as bytes.
        header_length: How long the JSON is, bytes; None: all of it.
        spec: The model that is asked.

    Raises:
        MalformedBodyError: If there is no JSON.
        InvalidFieldError: If a tensor's name, shape, datatype or data don't fit.
    """
    if header_length is not None and header_length > len(body):
        raise InvalidFieldError(
            f"header {HEADER_LENGTH!r}", f"is {header_length}", f"at most {len(body)}, the body's length"
        )
    header = body if header_length is None else body[:header_length]
    try:
        document = orjson.loads(header)
    except orjson.JSONDecodeError as error:
        raise MalformedBodyError(str(error) if header else "it is empty") from None
    if not isinstance(document, dict) or not isinstance(document.get("inputs"), list):
        raise InvalidFieldError("the body", "has no list 'inputs'", 'an object such as {"inputs": [{"name": …}, …]}')
    columns = _columns(document["inputs"], memoryview(body)[len(header) :])
    if ENTITY not in columns:
        known = f"a tensor {ENTITY!r}: variants are assigned, and predictions logged, by entity"
        raise InvalidFieldError("field 'inputs'", f"has {', '.join(map(repr, columns)) or 'no tensors'}", known)
    asked: dict[str, Any] = {"entity_ids": columns.pop(ENTITY)}
    inputs = {name: columns[name] for name in columns if name in spec.inputs}
    features = {name: columns[name] for name in columns if name not in spec.inputs}
    if inputs:
        asked["inputs"] = _rows(inputs)
    if features:
        asked["features"] = UniformOverrides.of_columns(features) or _rows(features)
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidFieldError("field 'id'", f"is {request_id!r}", "a text")
    return InferRequest(asked, request_id, _wanted(document))


def _rows(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _columns(tensors: list[Any], data: memoryview) -> dict[str, list[Any]]:
    """The tensors' values by name: all of one length."""
    columns: dict[str, list[Any]] = {}
    rows: int | None = None
    for at, tensor in enumerate(tensors):
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if not isinstance(name, str):
            raise InvalidFieldError(f"inputs[{at}]", "has no name", "an object with name, datatype, shape and data")
        if name in columns:
            raise InvalidFieldError(_place(name), "is there twice", "each tensor once")
        size = _binary_size(name, tensor)
        if size is not None and size > len(data):
            raise InvalidFieldError(
                _place(name), f"needs {size} bytes and {len(data)} are left", "its bytes behind the JSON"
            )
        values = columns[name] = _values(name, tensor, None if size is None else bytes(data[:size]))
        if size is not None:
            data = data[size:]
        if rows is None:
            rows = len(values)
        elif len(values) != rows:
            problem = f"has {len(values)} rows and {next(iter(columns))!r} has {rows}"
            raise InvalidFieldError(_place(name), problem, "as many rows in all tensors: one an entity")
    if len(data):
        raise InvalidFieldError("the body", f"has {len(data)} bytes that belong to no tensor", "binary_data_size")
    return columns


def _place(name: str) -> str:
    return f"tensor {name!r}"


def _binary_size(name: str, tensor: Mapping[str, Any]) -> int | None:
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
        raise InvalidFieldError(f"{_place(name)}: binary_data_size", f"is {size!r}", "a number of bytes")
    return size


def _values(name: str, tensor: Mapping[str, Any], content: bytes | None) -> list[Any]:
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if datatype not in _DATATYPES:
        raise InvalidFieldError(f"{_place(name)}: datatype", f"is {datatype!r}", f"one of {', '.join(_DATATYPES)}")
    if not _is_column(shape):
        expected = "[n] or [n, 1], n being the number of entities"
        raise InvalidFieldError(f"{_place(name)}: shape", f"is {shape!r}", expected)
    values = (
        _from_json(name, tensor.get("data"), datatype) if content is None else _from_bytes(name, content, datatype)
    )
    if len(values) != shape[0]:
        raise InvalidFieldError(_place(name), f"has {len(values)} values", f"{shape[0]}, as its shape says")
    return values


def _is_column(shape: object) -> TypeGuard[list[int]]:
    """Whether it is [n] or [n, 1]: of whole numbers, and true is none."""
    if type(shape) is not list or not 1 <= len(shape) <= 2 or type(shape[0]) is not int or shape[0] < 0:
        return False
    return len(shape) == 1 or (type(shape[1]) is int and shape[1] == 1)


def _from_json(name: str, data: object, datatype: str) -> list[Any]:
    if not isinstance(data, list):
        expected = "a list, or binary_data_size; there is no shared memory"
        raise InvalidFieldError(_place(name), "has no data", expected)
    if data and isinstance(data[0], list) and all(isinstance(each, list) for each in data):
        data = list(itertools.chain.from_iterable(data))
    if not _all_fit(data, datatype):
        wrong = next(each for each in data if not _all_fit([each], datatype))
        raise InvalidFieldError(_place(name), f"holds {_shortened(wrong)}", f"values of datatype {datatype}")
    return data


def _all_fit(data: list[Any], datatype: str) -> bool:
    """Whether all values fit: by their types and, of whole numbers, the extremes, without a look at each.

    null is no value of the protocol; here it is a null feature, since JSON has no NaN.
    """
    types = set(map(type, data))
    if NoneType in types:
        return _all_fit([each for each in data if each is not None], datatype)
    fitting = _FITTING.get(datatype)
    if fitting is not None:
        return types <= fitting
    least, most = _LIMITS[datatype]
    return not data or (types == {int} and least <= min(data) and max(data) <= most)


def _from_bytes(name: str, content: bytes, datatype: str) -> list[Any]:
    if datatype == _BYTES:
        return _texts(name, content)
    dtype = _NUMPY[datatype]
    if len(content) % dtype.itemsize:
        expected = f"a multiple of {dtype.itemsize}, the size of {datatype}"
        raise InvalidFieldError(_place(name), f"has {len(content)} bytes", expected)
    values = np.frombuffer(content, dtype)
    found: list[Any] = values.tolist()
    if dtype.kind == "f" and not np.isfinite(values).all():  # as JSON has them
        return [each if math.isfinite(each) else None for each in found]
    return found


def _texts(name: str, content: bytes) -> list[str]:
    found: list[str] = []
    at = 0
    while at < len(content):
        begin = at + _LENGTH.size
        end = begin + _LENGTH.unpack_from(content, at)[0] if begin <= len(content) else len(content) + 1
        if end > len(content):
            raise InvalidFieldError(
                _place(name), "ends within a text", "for each text its length in 4 bytes, then its bytes"
            )
        try:
            found.append(content[begin:end].decode())
        except UnicodeDecodeError:
            raise InvalidFieldError(_place(name), f"holds {content[begin:end][:20]!r}", "texts in UTF-8") from None
        at = end
    return found


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"


def _wanted(document: Mapping[str, Any]) -> tuple[tuple[str, bool], ...]:
    binary = _flag(document, "binary_data_output", default=False)
    outputs = document.get("outputs")
    if outputs in (None, []):
        outputs = [{"name": name} for name in OUTPUTS]
    if not isinstance(outputs, list) or not all(isinstance(each, dict) for each in outputs):
        raise InvalidFieldError(
            "field 'outputs'", f"is {_shortened(outputs)}", 'a list such as [{"name": "prediction"}]'
        )
    for each in outputs:
        name = each.get("name")
        if not isinstance(name, str) or name not in OUTPUTS:
            raise InvalidFieldError("field 'outputs'", f"names {_shortened(name)}", f"some of {', '.join(OUTPUTS)}")
    return tuple((each["name"], _flag(each, "binary_data", default=binary)) for each in outputs)


def _flag(holder: Mapping[str, Any], name: str, *, default: bool) -> bool:
    parameters = holder.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidFieldError("field 'parameters'", f"is {_shortened(parameters)}", "an object")
    value = (parameters or {}).get(name, default)
    if not isinstance(value, bool):
        raise InvalidFieldError(f"parameter {name!r}", f"is {_shortened(value)}", "true or false")
    return value


# ── Out ─────────────────────────────────────────────────────────────────────────────


def infer_body(answer: PredictAnswer, asked: InferRequest) -> tuple[bytes, int | None]:
    """The answer to a request for inference.

    Args:
        answer: To the same as ``POST /predict``.
        asked: Says which tensors, and whether as bytes.

    Returns:
        The body, and how much of it is JSON where bytes follow.
    """
    rows = answer.predictions
    values: dict[str, Callable[[], list[Any]]] = {
        "prediction": lambda: rows.scores,
        "model_version": lambda: rows.versions,
        "variant": lambda: rows.variants,
        "prediction_id": lambda: prediction_ids(answer.request_id, len(rows)),
        "fallback": lambda: [each or "" for each in rows.fallbacks],
    }
    outputs: list[dict[str, Any]] = []
    chunks: list[bytes] = []
    for name, binary in asked.outputs:
        tensor: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": [len(rows)]}
        if binary:
            chunks.append(_to_bytes(values[name](), OUTPUTS[name]))
            tensor["parameters"] = {"binary_data_size": len(chunks[-1])}
        else:
            tensor["data"] = values[name]()
        outputs.append(tensor)
    document: dict[str, Any] = {
        "model_name": answer.model,
        "model_version": str(answer.version),
        "parameters": {"request_id": answer.request_id, "logged": answer.logged},
        "outputs": outputs,
    }
    if asked.request_id is not None:
        document["id"] = asked.request_id
    header = orjson.dumps(document)
    return (b"".join([header, *chunks]), len(header)) if chunks else (header, None)


def _to_bytes(values: list[Any], datatype: str) -> bytes:
    if datatype == _BYTES:
        texts = [str(each).encode() for each in values]
        return b"".join(part for text in texts for part in (_LENGTH.pack(len(text)), text))
    return np.array(values, dtype=_NUMPY[datatype]).tobytes()
