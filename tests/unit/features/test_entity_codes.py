"""Entities' numbers: the same whether they are hashed or looked up in a table."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.features import entity_codes
from heliostat.features.entity_codes import EntityCodes

NEAR = st.integers(-20, 20)
EDGES = st.sampled_from([-(2**63), -(2**63) + 1, -1, 0, 1, 2**62, 2**63 - 2, 2**63 - 1])


@given(rows=st.lists(NEAR | EDGES, max_size=30), others=st.lists(NEAR | EDGES, max_size=30))
def test_each_distinct_key_has_one_number_and_other_keys_have_none(rows: list[int], others: list[int]) -> None:
    codes = EntityCodes(pa.array(rows, pa.int64()))
    numbers = dict(zip(rows, codes.rows.tolist(), strict=True))
    assert sorted(numbers.values()) == list(range(codes.n)) == list(range(len(set(rows))))
    assert [numbers[key] for key in codes.keys.to_pylist()] == list(range(codes.n))
    found = codes.of(pa.array([*others, *rows], pa.int64())).tolist()
    assert found == [numbers.get(key, -1) for key in (*others, *rows)]


@pytest.mark.parametrize("spread", [0, 16])
def test_keys_close_to_either_end_of_the_integers_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, spread: int
) -> None:
    monkeypatch.setattr(entity_codes, "_SPREAD", spread)
    low, high = -(2**63), 2**63 - 1
    for rows, others in (([low, low + 3], [high, 0, low + 1]), ([high, high - 5], [low, 0, high - 1])):
        codes = EntityCodes(pa.array(rows, pa.int64()))
        assert (codes._is_table, codes.n) == (spread > 0, 2)
        assert sorted(codes.of(pa.array(rows, pa.int64())).tolist()) == [0, 1]
        assert codes.of(pa.array(others, pa.int64())).tolist() == [-1, -1, -1]


def test_texts_are_hashed() -> None:
    codes = EntityCodes(pa.array(["b", "a", "b"]))
    assert codes.rows.tolist() == [0, 1, 0]
    assert codes.of(pa.array(["a", "c", "b"])).tolist() == [1, -1, 0]
