from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat import Entity
from heliostat.monitoring.served import COLUMNS, VECTORS, ServedRows
from heliostat.storage.offline_store import PREDICTIONS

customer = Entity("customer", keys={"customer_id": "int64"})
SCHEMA = pa.schema([PREDICTIONS.field(name) for name in (*COLUMNS, VECTORS)])


def _row(number: int, **other: Any) -> dict[str, Any]:
    row = {
        "prediction_id": f"p{number}",
        "entity": str(number),
        "at": number,
        "revision": 1,
        "variant": "control",
        "version": 1,
        "score": 0.5,
        "features": [1.0, None],
        "source": "model",
    }
    return {**row, **other}


def _served(*rows: dict[str, Any]) -> ServedRows:
    return ServedRows(pa.Table.from_pylist(list(rows), SCHEMA), customer)


def test_the_matrix_holds_what_the_model_saw_with_nulls_as_nan() -> None:
    served = _served(_row(1), _row(2, features=[3.0, 4.0]))
    np.testing.assert_array_equal(served.matrix(2), [[1.0, np.nan], [3.0, 4.0]])
    assert served.keys.to_pylist() == [1, 2]


def test_a_versions_rows_are_those_that_it_answered_by_itself() -> None:
    served = _served(_row(1), _row(2, version=2), _row(3, source="fallback"), _row(4, version=None), _row(5))
    assert served.of_version(1).keys.to_pylist() == [1, 5]


def test_rows_without_a_whole_vector_are_left_out_of_the_matrix() -> None:
    served = _served(_row(1), _row(2, features=None), _row(3, features=[1.0]), _row(4, features=[1.0, 2.0]))
    assert served.with_vectors(2).matrix(2).shape == (2, 2)


def test_no_rows_give_an_empty_matrix() -> None:
    assert _served(_row(1)).of_version(9).matrix(2).shape == (0, 2)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50)), max_size=30))
def test_the_newest_row_of_each_entity_is_kept(rows: list[tuple[int, int]]) -> None:
    served = _served(*(_row(number, entity=str(who), at=at) for number, (who, at) in enumerate(rows)))
    newest = served.newest_each()
    assert dict(zip(newest.keys.to_pylist(), newest.at_us.tolist(), strict=True)) == {
        who: max(at for other, at in rows if other == who) for who, _ in rows
    }
    assert len(newest) == len({who for who, _ in rows})


@given(st.integers(0, 40), st.integers(1, 50), st.randoms(use_true_random=False))
def test_a_sample_is_the_same_whatever_the_order_of_the_rows(n: int, size: int, random: Any) -> None:
    rows = [_row(number) for number in range(n)]
    shuffled = rows.copy()
    random.shuffle(shuffled)
    one, other = _served(*rows).sample(size), _served(*shuffled).sample(size)
    assert len(one) == min(n, size)
    assert set(one.keys.to_pylist()) == set(other.keys.to_pylist())


def test_a_sample_favours_nobody() -> None:
    served = _served(*(_row(number) for number in range(4_000)))
    chosen = served.sample(1_000).keys.to_numpy()
    # The mean of 1,000 draws without replacement from 0…3,999 has a standard deviation of 32.
    assert chosen.mean() == pytest.approx(1_999.5, abs=4 * 32)
