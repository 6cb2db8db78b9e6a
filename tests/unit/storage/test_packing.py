"""A read as bytes: in C as the client's own library writes it."""

from __future__ import annotations

import shutil

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import HiredisRespSerializer

from heliostat.storage import quick_commands

KEYS = st.text(st.characters(codec="utf-8"), max_size=300)


@given(st.lists(KEYS, min_size=1, max_size=12))
def test_a_read_is_packed_in_c_as_the_clients_library_packs_it(keys: list[str]) -> None:
    if quick_commands._packing is None:
        pytest.skip("built without a compiler")
    assert quick_commands._mget(keys) == [quick_commands._packed(keys)]


def test_many_keys_are_counted_right() -> None:
    keys = [f"hs:p:r:source:entity:{{b3}}:{number}" for number in range(1_200)]
    assert quick_commands._mget(keys) == [quick_commands._packed(keys)]


def test_what_is_no_list_of_texts_is_left_to_the_clients_library() -> None:
    for keys in (("a", "b"), [b"a", "b"]):
        assert quick_commands._mget(keys) == [quick_commands._packed(keys)]  # type: ignore[arg-type]


def test_reads_are_packed_in_c_wherever_there_is_a_compiler() -> None:
    assert quick_commands._packing is not None or shutil.which("cc") is None


ARGUMENT = st.text(st.characters(codec="utf-8"), max_size=40) | st.binary(max_size=40) | st.integers() | st.floats()


@given(st.sampled_from(["SET", "EVALSHA", "CONFIG GET", b"CLIENT SETNAME"]), st.lists(ARGUMENT, max_size=8))
def test_a_command_is_packed_as_the_client_would(name: str | bytes, arguments: list[object]) -> None:
    theirs = HiredisRespSerializer().pack(name, *arguments)  # type: ignore[arg-type]  # its hint says lists
    assert quick_commands.CommandPacker().pack(name, *arguments) == theirs


def test_buffers_are_packed_as_their_bytes() -> None:
    packed = quick_commands.CommandPacker().pack("SET", bytearray(b"a"), memoryview(b"bc"))
    assert packed == [b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$2\r\nbc\r\n"]


def test_what_no_command_can_carry_is_refused() -> None:
    with pytest.raises(redis.DataError):
        quick_commands.CommandPacker().pack("SET", "a", None)
