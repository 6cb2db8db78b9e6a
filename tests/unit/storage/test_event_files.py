from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from heliostat.schema import TIMESTAMP
from heliostat.storage.event_files import cut


def events(*times_us: int) -> pa.Table:
    return pa.table({"at": pa.array(times_us, pa.int64()).cast(TIMESTAMP), "n": np.arange(len(times_us))})


@pytest.mark.parametrize(
    ("low", "high", "kept"),
    [
        (None, None, [0, 1, 2, 3]),
        (20, None, [1, 2, 3]),
        (21, 40, [2]),
        (20, 30, [1]),
        (None, 10, []),
        (41, None, []),
    ],
)
def test_the_lower_bound_is_inside_and_the_upper_one_outside(
    low: int | None, high: int | None, kept: list[int]
) -> None:
    assert cut(events(10, 20, 30, 40), "at", low, high).column("n").to_pylist() == kept


def test_rows_in_no_order_are_all_found() -> None:
    assert cut(events(40, 10, 30, 20, 35), "at", 25, 40).column("n").to_pylist() == [2, 4]


def test_neighbours_arent_copied() -> None:
    given = events(*range(100))
    found = cut(given, "at", 40, 60)
    assert found.column("n").chunk(0).buffers()[1].address == given.column("n").chunk(0).buffers()[1].address


def test_no_rows_are_no_rows() -> None:
    assert cut(events(), "at", 1, 2).num_rows == 0
