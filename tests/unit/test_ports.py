"""Free ports are this machine's, and nobody's."""

from __future__ import annotations

import random
import socket

import pytest

from heliostat import ports


def test_free_ports_are_none_that_a_connection_might_get_and_none_where_somebody_listens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        everywhere = ports.free_ports("127.0.0.1", 9_000)
        assert taken.getsockname()[1] not in everywhere
    (listened_at,) = ports.free_ports("127.0.0.1", 1)
    with socket.create_server(("127.0.0.1", listened_at)):
        assert listened_at not in ports.free_ports("127.0.0.1", 9_000)
    assert len(set(everywhere)) == 9_000
    assert max(everywhere) < 32_768
    assert ports.free_ports("127.0.0.1", 0) == []
    monkeypatch.setattr(ports, "_given", set())
    first, second = (set(ports.free_ports("127.0.0.1", 400)) for _ in range(2))
    assert not first & second, "not yet listened at, but given"
    for wrong in ("192.0.2.99", "no.such.host.invalid"):
        with pytest.raises(OSError, match=r"assign|known|resol"):
            ports.free_ports(wrong, 1)


def test_processes_that_seed_alike_get_other_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    found, state = list[list[int]](), random.getstate()
    try:
        for _ in range(2):
            random.seed(0)
            monkeypatch.setattr(ports, "_given", set())  # as in another process
            found.append(ports.free_ports("127.0.0.1", 20))
    finally:
        random.setstate(state)
    assert found[0] != found[1]
