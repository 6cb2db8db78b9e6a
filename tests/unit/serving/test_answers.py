"""An answer as JSON: in C what Python's objects would give, byte for byte."""

from __future__ import annotations

import shutil
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.serving import answers
from heliostat.serving.answers import PredictAnswer, Predictions

IDS = st.integers(-(2**63), 2**63 - 1) | st.text(max_size=9) | st.text('\\"[]{},\0é', max_size=6)
MULTI_KEY_IDS = st.dictionaries(st.text(max_size=5), IDS, max_size=2) | st.lists(IDS, max_size=2)
NAMES = st.lists(st.text(max_size=6), max_size=2).map(tuple)
ROWS = st.lists(
    st.tuples(
        IDS | MULTI_KEY_IDS,
        st.floats(),
        st.sampled_from(["control", "challenger", "forced:\u2603", 'o"\\']) | st.text(max_size=9),
        st.integers(1, 40),
        NAMES,
        NAMES,
        st.none() | st.just("prior"),
    ),
    max_size=30,
)


def answer_of(rows: list[tuple[Any, ...]]) -> PredictAnswer:
    ids, scores, variants, versions, missing, absent, fallbacks = (list(column) for column in zip(*rows, strict=True))
    told = Predictions(scores, versions, fallbacks, [], missing, variants, absent)
    return PredictAnswer("0123456789abcdef", "churn", 3, 7, tuple(ids), told)


@given(ROWS.filter(bool), st.booleans())
def test_c_writes_the_bytes_of_the_document(rows: list[tuple[Any, ...]], by_a_model: bool) -> None:
    answer = answer_of([(*row[:-1], None) for row in rows] if by_a_model else rows)
    assert answer.to_json(1.23456) == orjson.dumps(answer.document(1.23456))


def test_many_rows_of_more_kinds_than_are_remembered() -> None:
    rows = [(row, row / 7, f"variant {row % 11}", row % 13, ("a__b",) * (row % 3), (), None) for row in range(1_234)]
    answer = answer_of(rows)
    assert answer.to_json(0.5) == orjson.dumps(answer.document(0.5))


@pytest.mark.parametrize(
    ("ids", "scores", "error"),
    [
        (b"[1]", b"[0.5,0.5]", "row 1 has no entity id"),
        (b"[1,2]", b"[0.5]", "row 1 has no score"),
        (b"[1,2,3]", b"[0.5,0.5]", "more ids or scores than 2 rows"),
        (b"[]", b"[]", "row 0 has no entity id"),
        (b"", b"", "row 0 has no entity id"),
        (b"[1,[2", b"[0.5,0.5]", "row 1 has no entity id"),
        (b'[1,"2', b"[0.5,0.5]", "row 1 has no entity id"),
    ],
)
def test_columns_of_different_lengths_are_refused(ids: bytes, scores: bytes, error: str) -> None:
    if answers._writing is None:
        pytest.skip("built without a compiler")
    columns = ["a", "a"], [1, 1], [(), ()], [(), ()]
    with pytest.raises(ValueError, match=error):
        answers._writing.entities(ids, scores, "r", *columns, answers._frame)


def test_what_isnt_a_column_or_a_frame_is_refused() -> None:
    if answers._writing is None:
        pytest.skip("built without a compiler")
    write, columns = answers._writing.entities, (["a"], [1], [()], [()])
    for wrong in (("[1]", b"[1]", "r"), (b"[1]", None, "r"), (b"[1]", b"[1]", b"r")):
        with pytest.raises(TypeError):
            write(*wrong, *columns, answers._frame)
    with pytest.raises(TypeError):
        write(b"[1]", b"[1]", "r", ("a",), *columns[1:], answers._frame)
    with pytest.raises(TypeError):
        write(b"[1]", b"[1]", "r")
    for frame in (lambda *_: None, lambda *_: (b"",) * 3, lambda *_: ("",) * 4):
        with pytest.raises(TypeError, match="a tuple of 4 bytes"):
            write(b"[1]", b"[1]", "r", *columns, frame)
    for longer in (["a", "a"], *columns[1:]), (*columns[:3], [(), ()]):
        with pytest.raises(ValueError, match="columns of"):
            write(b"[1]", b"[1]", "r", *longer, answers._frame)
    with pytest.raises(ZeroDivisionError):
        write(b"[1]", b"[1]", "r", *columns, lambda *_: 1 / 0)


def test_answers_are_written_in_c_wherever_there_is_a_compiler() -> None:
    assert answers._writing is not None or shutil.which("cc") is None
