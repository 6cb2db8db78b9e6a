from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from heliostat.serving.last_seen import LastSeen


def kept(seen: LastSeen, entity: str, *, now_us: int = 0) -> tuple[list[float], int] | None:
    found = seen.recall(entity, now_us=now_us)
    return None if found is None else (found[0].tolist(), found[1])


def test_the_newest_vector_of_an_entity_is_given_with_its_age() -> None:
    seen = LastSeen(("a", "b"), entities=8, max_age_us=100)
    seen.keep(["x", "y"], np.array([[1.0, 2.0], [3.0, 4.0]]), at_us=10)
    seen.keep(["x"], np.array([[5.0, 6.0]]), at_us=20)
    assert kept(seen, "x", now_us=30) == ([5.0, 6.0], 10)
    assert kept(seen, "y", now_us=30) == ([3.0, 4.0], 20)
    assert kept(seen, "z") is None


def test_too_old_a_vector_isnt_given() -> None:
    seen = LastSeen(("a",), entities=8, max_age_us=100)
    seen.keep(["x"], np.array([[1.0]]), at_us=10)
    assert kept(seen, "x", now_us=110) is not None
    assert kept(seen, "x", now_us=111) is None


@given(
    batches=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), max_size=30),
    entities=st.integers(2, 20).map(lambda half: 2 * half),
)
def test_the_last_half_is_always_known_rightly_and_never_are_more_kept_than_may(
    batches: list[list[int]], entities: int
) -> None:
    seen = LastSeen(("a",), entities=entities, max_age_us=10**9)
    history: list[tuple[str, float]] = []
    for at, batch in enumerate(batches):
        values = [1000.0 * at + place for place in range(len(batch))]
        seen.keep([str(each) for each in batch], np.array(values)[:, None], at_us=0)
        history += zip(map(str, batch), values, strict=True)
    newest = dict(history)
    for entity, _ in history[-(entities // 2) :]:
        assert kept(seen, entity) is not None
    for entity in map(str, range(31)):
        found = kept(seen, entity)
        if found is not None:
            assert found[0] == [newest[entity]], "never another entity's, never an outdated one"
    assert sum(half.used for half in (seen._young, seen._old)) <= entities
    assert all(len(half.rows) <= half.used for half in (seen._young, seen._old))
