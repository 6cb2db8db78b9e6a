"""Bundles of rings: one by one, many at once, and what isn't one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.storage.bundles import RING_ID_BYTES, RingBytes, bundles, directory_bytes, ring_id, rings_in
from tests.rings import bundled

RINGS = st.integers(0, 4).map(lambda words: bytes(range(8 * words)))


def test_a_rings_id_begins_with_the_views_and_ends_with_the_layouts() -> None:
    one, other_layout, other_view = ring_id("a@1", "1d.0"), ring_id("a@1", "1h.0"), ring_id("a@2", "1d.0")
    assert {len(each) for each in (one, other_layout, other_view)} == {RING_ID_BYTES}
    assert one[:8] == other_layout[:8] != other_view[:8]
    assert one[8:] == other_view[8:] != other_layout[8:]


@given(st.dictionaries(st.binary(min_size=16, max_size=16), RINGS, max_size=5))
def test_what_is_bundled_is_in_the_bundle_without_rings_of_nothing(rings: dict[bytes, bytes]) -> None:
    there = {each: ring for each, ring in rings.items() if ring}
    bundle = bundled(rings)
    assert rings_in(bundle) == there
    assert list(rings_in(bundle)) == list(there)
    assert len(bundle) == directory_bytes(len(there)) + sum(map(len, there.values()))


@given(st.integers(1, 3), st.integers(0, 6), st.data())
def test_many_bundles_at_once_are_the_same_as_one_by_one(n_layouts: int, n: int, data: st.DataObject) -> None:
    ids = [bytes([at]) * 16 for at in range(n_layouts)]
    columns = [data.draw(st.lists(RINGS, min_size=n, max_size=n)) for _ in ids]
    rings = [RingBytes(b"".join(each), np.array([len(ring) for ring in each], dtype=np.int64)) for each in columns]
    found = bundles(ids, rings)
    assert found.split() == [bundled(dict(zip(ids, row, strict=True))) for row in zip(*columns, strict=True)]


def test_no_value_is_no_rings() -> None:
    assert rings_in(None) == rings_in(b"") == {}


@given(st.binary(min_size=1, max_size=120))
def test_other_bytes_are_no_bundle(value: bytes) -> None:
    try:
        rings = rings_in(value)
    except ValueError:
        return
    assert bundled(rings) == value


def test_a_bundle_that_was_cut_short_is_none() -> None:
    bundle = bundled({b"1" * 16: bytes(16), b"2" * 16: bytes(8)})
    for length in range(1, len(bundle)):
        with pytest.raises(ValueError, match="no bundle"):
            rings_in(bundle[:length])
