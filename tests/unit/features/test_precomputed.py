from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.clock import parse_instant_us
from heliostat.errors import InvalidDefinitionError
from heliostat.features.aggregations import Latest
from heliostat.features.definitions import Entity, FloatArray
from heliostat.features.offline import compute_features
from heliostat.features.precomputed import COMPUTED_AT, ROW_ID, PrecomputedView
from heliostat.models.definitions import Definitions

AT = parse_instant_us("2026-05-01")
USER = Entity("user", keys={"user_id": "int64"})
SCORES = PrecomputedView("scores", version=1, entity=USER, features={"risk": "Of not paying", "norm": ""})


def _rows(**columns: object) -> pa.Table:
    return SCORES.rows(pa.table({"user_id": [7], "risk": [0.5], "norm": [2.0], **columns}), AT, newest_us=AT)


def _id(**columns: object) -> int:
    row_id: int = _rows(**columns).column(ROW_ID)[0].as_py()
    return row_id


def test_a_precomputed_view_is_a_view_over_a_source_of_its_own() -> None:
    found = Definitions.of([SCORES])
    assert list(found.views) == ["scores@1"]
    assert list(found.sources) == ["scores_v1"]
    assert found.entities == {"user": USER}
    assert all(isinstance(each, Latest) for each in SCORES.base_features.values())
    assert SCORES.base_features["risk"].description == "Of not paying"


@pytest.mark.parametrize("feature", ["user_id", COMPUTED_AT, ROW_ID])
def test_a_feature_cant_have_the_name_of_a_rows_own_column(feature: str) -> None:
    with pytest.raises(InvalidDefinitionError, match=feature):
        PrecomputedView("s", version=1, entity=USER, features=[feature])


def test_a_description_isnt_part_of_the_meaning_and_a_ttl_is() -> None:
    other = PrecomputedView("scores", version=1, entity=USER, features=["risk", "norm"], owner="x")
    shorter = PrecomputedView("scores", version=1, entity=USER, features=["risk", "norm"], ttl="7d")
    assert other.content_hash == SCORES.content_hash != shorter.content_hash


def test_derived_features_are_computed_from_written_ones() -> None:
    view = PrecomputedView("scores", version=1, entity=USER, features=["risk"])

    @view.derived
    def safe(risk: FloatArray) -> FloatArray:
        return 1 - risk

    events = view.rows(pa.table({"user_id": [7], "risk": [0.25]}), AT, newest_us=AT)
    found = compute_features([view], events, pa.array([7]), np.array([AT + 1]))
    assert found["scores__safe"].tolist() == [0.75]


def test_a_rows_id_never_changes() -> None:
    assert _id() == 7047634650869544738
    assert _id(risk=[None]) == _id(risk=[float("nan")])
    assert _id(risk=pa.array([None], pa.null())) == _id(risk=[None])
    assert _id(risk=[-0.0]) == _id(risk=[0.0]) == _id(risk=[0]) == _id(risk=[False])
    assert _id(user_id=pa.array([7], pa.int32())) == _id()


def test_a_rows_id_tells_key_time_and_every_value_apart() -> None:
    later = SCORES.rows(pa.table({"user_id": [7], "risk": [0.5], "norm": [2.0]}), AT - 1, newest_us=AT)
    ids = [_id(), _id(user_id=[8]), _id(risk=[0.25]), _id(norm=[0.5]), _id(risk=[2.0], norm=[0.5]), _id(norm=[None])]
    assert len({*ids, later.column(ROW_ID)[0].as_py()}) == 7


def test_qualified_names_are_understood_so_that_what_was_read_can_be_written() -> None:
    table = pa.table({"user_id": [7], "scores__risk": [0.5], "scores@1__norm": [2.0]})
    assert SCORES.rows(table, AT, newest_us=AT).equals(_rows())


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 5), st.one_of(st.none(), st.floats(-1e12, 1e12))),
        min_size=1,
        max_size=20,
    ),
    st.randoms(use_true_random=False),
)
def test_the_latest_row_counts_in_any_order_and_equal_instants_have_one_winner(
    rows: list[tuple[int, int, float | None]], random: object
) -> None:
    view = PrecomputedView("s", version=1, entity=USER, features=["x"])
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    asked = np.repeat([0, 1, 2], 7)
    instants = np.tile(np.arange(7), 3) + AT

    def joined(order: list[tuple[int, int, float | None]]) -> FloatArray:
        table = pa.table(
            {
                "user_id": [row[0] for row in order],
                "at": [AT + row[1] for row in order],
                "x": pa.array([row[2] for row in order], pa.float64()),
            }
        )
        events = view.rows(table, "at", newest_us=AT + 10)
        return compute_features([view], events, pa.array(asked), instants)["s__x"]

    found = joined(rows)
    np.testing.assert_array_equal(found, joined(shuffled))
    for user, instant, value in zip(asked, instants, found, strict=True):
        own = [(AT + at, x) for who, at, x in rows if who == user and AT + at < instant]
        newest = max((at for at, _ in own), default=None)
        allowed = [np.nan if x is None else x for at, x in own if at == newest] or [np.nan]
        assert any(np.array_equal(value, each, equal_nan=True) for each in allowed)
