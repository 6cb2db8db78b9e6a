from __future__ import annotations

import asyncio
import contextlib

import pytest

from benchmarks import load
from benchmarks.load import Outcome, bodies, generate


@pytest.mark.parametrize("url", ["http://192.0.2.1:80/predict", "http://example.org:80/", "http://127.0.0.1/predict"])
def test_only_a_loopback_address_with_a_port_is_loaded(url: str) -> None:
    with pytest.raises(ValueError, match="loopback"):
        asyncio.run(generate(url, [b"{}"], concurrency=1, seconds=1, most=1))


@pytest.mark.parametrize(
    "bounds",
    [
        {"concurrency": 1_000, "seconds": 1, "most": 1},
        {"concurrency": 1, "seconds": 3_600, "most": 1},
        {"concurrency": 1, "seconds": 1, "most": 10**9},
    ],
)
def test_load_is_bounded_in_time_number_and_connections(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at most"):
        asyncio.run(generate("http://127.0.0.1:9/predict", [b"{}"], **bounds))


def test_figures_are_of_the_answers_alone() -> None:
    outcome = Outcome(requests=100, failed=3, seconds=2.0, latencies_ms=[float(each) for each in range(100)])
    summary = outcome.summary()
    assert (summary["requests_per_s"], summary["p50_ms"], summary["p99_ms"]) == (50.0, 50.0, 99.0)


def test_the_same_seed_asks_for_the_same_entities() -> None:
    assert bodies(3, 10, seed=1) == bodies(3, 10, seed=1) != bodies(3, 10, seed=2)


def asked_of(answers: list[list[bytes]], most: int) -> tuple[Outcome, int]:
    """What is counted of a server that gives these answers in turn, in pieces; and how often it was connected to.

    An answer without pieces closes the connection.
    """
    turns, connections = iter(answers), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"{}"):
                pieces = next(turns)
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.01)
                if not pieces:
                    break
        writer.close()

    async def scenario() -> Outcome:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            return await generate(f"http://127.0.0.1:{port}/", [b"{}"], concurrency=1, seconds=20, most=most)

    return asyncio.run(scenario()), connections


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine"
LAST = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def test_an_answer_counts_when_all_of_it_is_there_in_however_many_pieces() -> None:
    outcome, connections = asked_of([[OK], [OK[:9], OK[9:40], OK[40:41], OK[41:]], [OK[:-1], OK[-1:]]], most=3)
    assert (outcome.requests, outcome.failed, connections) == (3, 0, 1)
    assert len(outcome.latencies_ms) == 3


def test_after_the_last_answer_of_a_connection_there_is_another_connection() -> None:
    outcome, connections = asked_of([[LAST], [OK], [LAST], [OK]], most=4)
    assert (outcome.requests, outcome.failed, connections) == (4, 0, 3)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ([b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"], "503"),
        ([], "closed"),
        ([OK + b"more"], "Content-Length"),
        ([b"HTTP/1.1 200 OK\r\n\r\n"], "no Content-Length"),
    ],
)
def test_what_is_no_whole_answer_is_a_failure_that_is_named_and_the_next_request_is_sent(
    answer: list[bytes], why: str
) -> None:
    outcome, _ = asked_of([answer, [OK], [OK]], most=3)
    assert (outcome.requests, outcome.failed) == (2, 1)
    assert why in outcome.first_failure


def test_an_answer_that_doesnt_come_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_ANSWER_LIMIT_S", 0.2)
    outcome, _ = asked_of([[OK[:-1]], [OK]], most=2)
    assert (outcome.requests, outcome.failed) == (1, 1)
    assert "TimeoutError" in outcome.first_failure
