"""A read as bytes: in C as the client's own library writes it."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.storage import quick_reads

KEYS = st.text(st.characters(codec="utf-8"), max_size=300)


@given(st.lists(KEYS, min_size=1, max_size=12))
def test_a_read_is_packed_in_c_as_the_clients_library_packs_it(keys: list[str]) -> None:
    if quick_reads._packing is None:
        pytest.skip("built without a compiler")
    assert quick_reads._mget(keys) == [quick_reads._packed(keys)]


def test_many_keys_are_counted_right() -> None:
    keys = [f"hs:p:r:view@1:1d.0:{{b3}}:{number}" for number in range(1_200)]
    assert quick_reads._mget(keys) == [quick_reads._packed(keys)]


def test_what_is_no_list_of_texts_is_left_to_the_clients_library() -> None:
    for keys in (("a", "b"), [b"a", "b"]):
        assert quick_reads._mget(keys) == [quick_reads._packed(keys)]  # type: ignore[arg-type]


def test_reads_are_packed_in_c_wherever_there_is_a_compiler() -> None:
    assert quick_reads._packing is not None or shutil.which("cc") is None
