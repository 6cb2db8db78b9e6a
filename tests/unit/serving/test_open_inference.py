from __future__ import annotations

import contextlib
import math
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import InvalidFieldError, MalformedBodyError
from heliostat.features.request import UniformOverrides
from heliostat.serving.answers import PredictAnswer, Predictions
from heliostat.serving.open_inference import OUTPUTS, InferRequest, infer_body, model_document, parse_infer
from tests.unit.serving.collaborators import CHURN, NAMES


def tensor(name: str, datatype: str, data: list[Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [len(data)], "data": data, **more}


def parsed(*tensors: dict[str, Any], **document: Any) -> InferRequest:
    return parse_infer(orjson.dumps({"inputs": tensors, **document}), None, CHURN)


def asked(*tensors: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = parsed(*tensors).body
    return found


def binary(*tensors: tuple[str, str, bytes, int]) -> InferRequest:
    described = [
        {"name": name, "datatype": datatype, "shape": [rows, 1], "parameters": {"binary_data_size": len(content)}}
        for name, datatype, content, rows in tensors
    ]
    header = orjson.dumps({"inputs": described})
    return parse_infer(header + b"".join(content for _, _, content, _ in tensors), len(header), CHURN)


def texts(*values: str) -> bytes:
    return b"".join(struct.pack("<I", len(each.encode())) + each.encode() for each in values)


def test_tensors_become_the_body_of_a_request_for_predictions() -> None:
    found = asked(
        tensor("entity_id", "INT64", [1, 2]), tensor(NAMES[0], "FP64", [3.5, None]), tensor("mean", "INT32", [1, 2])
    )
    assert found == {
        "entity_ids": [1, 2],
        "features": [{NAMES[0]: 3.5, "mean": 1}, {NAMES[0]: None, "mean": 2}],
    }


def test_tensors_of_numbers_alone_stay_an_array() -> None:
    found = asked(
        tensor("entity_id", "INT64", [1, 2]), tensor(NAMES[0], "FP64", [3.5, 4]), tensor("mean", "INT32", [1, 2])
    )["features"]
    assert isinstance(found, UniformOverrides)
    assert found == {0: {NAMES[0]: 3.5, "mean": 1.0}, 1: {NAMES[0]: 4.0, "mean": 2.0}}


def test_nested_and_flat_data_are_the_same() -> None:
    nested = {"name": "entity_id", "datatype": "BYTES", "shape": [2, 1], "data": [["a"], ["b"]]}
    assert asked(nested) == asked({**nested, "data": ["a", "b"]}) == {"entity_ids": ["a", "b"]}


def test_bytes_behind_the_json_are_the_tensors_in_turn() -> None:
    found = binary(
        ("entity_id", "INT64", np.array([7, -(2**63)], "<i8").tobytes(), 2),
        (NAMES[0], "FP32", np.array([0.1, math.nan], "<f4").tobytes(), 2),
        ("mean", "BYTES", texts("é", ""), 2),
    )
    assert found.body == {
        "entity_ids": [7, -(2**63)],
        "features": [{NAMES[0]: float(np.float32(0.1)), "mean": "é"}, {NAMES[0]: None, "mean": ""}],
    }


@given(st.lists(st.text(), min_size=1, max_size=5), st.data())
def test_texts_come_back_from_their_bytes_and_no_part_of_them_breaks_anything(
    values: list[str], data: st.DataObject
) -> None:
    content = texts(*values)
    assert binary(("entity_id", "BYTES", content, len(values))).body == {"entity_ids": values}
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    with pytest.raises(InvalidFieldError):
        binary(("entity_id", "BYTES", cut, len(values)))


@given(st.binary(max_size=200), st.none() | st.integers(0, 250))
def test_any_bytes_are_read_or_refused(body: bytes, header_length: int | None) -> None:
    with contextlib.suppress(MalformedBodyError, InvalidFieldError):
        parse_infer(body, header_length, CHURN)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NEARLY = st.fixed_dictionaries(
    {"name": st.sampled_from(["entity_id", NAMES[0]]) | ANY},
    optional={
        "datatype": st.sampled_from(["INT64", "BYTES", "FP32", "BOOL"]) | ANY,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | ANY,
        "data": st.lists(ANY, max_size=3) | ANY,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": ANY}) | ANY,
    },
)


@given(st.lists(NEARLY, max_size=3) | ANY, ANY, st.lists(ANY, max_size=2) | ANY)
def test_any_document_is_read_or_refused(inputs: Any, parameters: Any, outputs: Any) -> None:
    with contextlib.suppress(MalformedBodyError, InvalidFieldError):
        parse_infer(orjson.dumps({"inputs": inputs, "parameters": parameters, "outputs": outputs}), None, CHURN)


WRONG = [
    ([], "a tensor 'entity_id'"),
    ([tensor("mean", "FP64", [1.0])], "a tensor 'entity_id'"),
    ([tensor("entity_id", "INT64", [1]), tensor("entity_id", "INT64", [1])], "each tensor once"),
    ([tensor("entity_id", "INT64", [1]), tensor("mean", "FP64", [1.0, 2.0])], "as many rows"),
    ([tensor("entity_id", "INT65", [1])], "one of BOOL"),
    ([tensor("entity_id", "INT64", [1.5])], "values of datatype INT64"),
    ([tensor("entity_id", "INT64", [True])], "values of datatype INT64"),
    ([tensor("entity_id", "INT8", [1, 128])], "holds 128"),
    ([tensor("entity_id", "UINT64", [-1, 1])], "holds -1"),
    ([tensor("entity_id", "FP64", [1.0, False])], "holds False"),
    ([tensor("entity_id", "BOOL", [True, 1])], "holds 1"),
    ([tensor("entity_id", "INT8", [128])], "values of datatype INT8"),
    ([tensor("entity_id", "BYTES", [1])], "values of datatype BYTES"),
    ([tensor("entity_id", "BOOL", [0])], "values of datatype BOOL"),
    ([tensor("entity_id", "INT64", [1], shape=[2])], "2, as its shape says"),
    ([tensor("entity_id", "INT64", [1], shape=[1, 2])], r"\[n\] or \[n, 1\]"),
    ([tensor("entity_id", "INT64", [1], shape=[True])], r"\[n\] or \[n, 1\]"),
    ([{"name": "entity_id", "datatype": "INT64", "shape": [1]}], "there is no shared memory"),
    ([tensor("entity_id", "INT64", [1], parameters={"binary_data_size": 8})], "needs 8 bytes and 0 are left"),
    ([tensor("entity_id", "INT64", [1], parameters={"binary_data_size": True})], "a number of bytes"),
    ([3], "an object with name"),
]


@pytest.mark.parametrize(("tensors", "said"), WRONG)
def test_each_wrong_tensor_is_told_what_was_expected(tensors: list[Any], said: str) -> None:
    with pytest.raises(InvalidFieldError, match=said):
        parsed(*tensors)


def test_a_body_that_is_no_json_or_whose_bytes_belong_to_nobody_is_refused() -> None:
    with pytest.raises(MalformedBodyError, match="it is empty"):
        parse_infer(b"", None, CHURN)
    with pytest.raises(InvalidFieldError, match="the body's length"):
        parse_infer(b"{}", 3, CHURN)
    header = orjson.dumps({"inputs": [tensor("entity_id", "INT64", [1])]})
    with pytest.raises(InvalidFieldError, match="1 bytes that belong to no tensor"):
        parse_infer(header + b"x", len(header), CHURN)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"outputs": [{"name": "score"}]}, "some of prediction"),
        ({"outputs": 3}, "a list such as"),
        ({"outputs": {}}, "a list such as"),
        ({"outputs": [{"name": "prediction", "parameters": {"binary_data": 1}}]}, "true or false"),
        ({"parameters": [1]}, "an object"),
        ({"id": 3}, "a text"),
    ],
)
def test_each_wrong_wish_is_told_what_was_expected(document: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidFieldError, match=said):
        parsed(tensor("entity_id", "INT64", [1]), **document)


ANSWER = PredictAnswer(
    "r1",
    "churn",
    2,
    5,
    (1, 9),
    Predictions([0.25, 0.5], [2, 1], [None, "prior"], [], [(), ()], ["control", "challenger"], [(), ()]),
)


def test_an_answer_has_all_tensors_where_none_is_named() -> None:
    body, header_length = infer_body(ANSWER, parsed(tensor("entity_id", "INT64", [1, 9]), id="mine"))
    assert header_length is None
    document = orjson.loads(body)
    assert (document["id"], document["model_name"], document["model_version"]) == ("mine", "churn", "2")
    assert {each["name"]: each["data"] for each in document["outputs"]} == {
        "prediction": [0.25, 0.5],
        "model_version": [2, 1],
        "variant": ["control", "challenger"],
        "prediction_id": ["r1-0", "r1-1"],
        "fallback": ["", "prior"],
    }
    assert {each["name"]: each["datatype"] for each in document["outputs"]} == OUTPUTS


def test_an_answer_has_the_tensors_that_were_wanted_as_they_were_wanted() -> None:
    outputs = [{"name": "variant", "parameters": {"binary_data": True}}, {"name": "prediction"}]
    wish = parsed(tensor("entity_id", "INT64", [1, 9]), outputs=[*outputs, {"name": "model_version"}])
    body, header_length = infer_body(ANSWER, wish)
    assert header_length is not None
    first, second, third = orjson.loads(body[:header_length])["outputs"]
    assert first["parameters"] == {"binary_data_size": len(body) - header_length}
    assert body[header_length:] == texts("control", "challenger")
    assert (second["data"], third["data"], "data" in first) == ([0.25, 0.5], [2, 1], False)


def test_the_model_says_what_it_needs_and_what_it_takes_besides() -> None:
    document = model_document(CHURN, (1, 3), [*NAMES, "mean"])
    assert document["versions"] == ["1", "3"]
    assert document["inputs"] == [{"name": "entity_id", "datatype": "INT64", "shape": [-1]}]
    assert [each["name"] for each in document["optional_inputs"]] == list(NAMES)
