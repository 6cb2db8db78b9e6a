"""Hashes that place keys: the quick way for a request's keys is the same as the one for tables."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.schema import bucket_of, hash64, integer_buckets

KEYS = st.integers(-(2**63), 2**63 - 1)


@given(keys=st.lists(KEYS, max_size=40), n_buckets=st.sampled_from([1, 2, 16, 257]))
def test_a_requests_integer_keys_are_in_the_buckets_that_the_log_has_them_in(keys: list[int], n_buckets: int) -> None:
    assert integer_buckets(keys, n_buckets) == bucket_of(hash64(pa.array(keys, pa.int64())), n_buckets).tolist()


@pytest.mark.parametrize("n", [1, 20])
def test_the_ends_of_the_range_have_buckets(n: int) -> None:
    for key in (-(2**63), -1, 0, 2**63 - 1):
        keys = [key] * n
        assert integer_buckets(keys, 16) == bucket_of(hash64(pa.array(keys, pa.int64())), 16).tolist()
