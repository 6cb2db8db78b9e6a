"""A load generator for one loopback address: bounded in time and number, one line of JSON out.

    python benchmarks/load.py http://127.0.0.1:8000/predict --entities 100 --concurrency 16 --seconds 2

Keeps ``concurrency`` connections busy: each sends a request, waits for its answer, sends the
next. Nothing but the standard library, and answers are counted without being kept, so that the
client costs the server as little of the machine as it can.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_SECONDS = 60.0
MOST_REQUESTS = 500_000
MOST_CONNECTIONS = 256
_ANSWER_LIMIT_S = 15.0
_BODIES = 512


@dataclass
class Outcome:
    """What a run has shown.

    Attributes:
        requests: Answers with status 200.
        failed: Other answers, broken connections and missing answers.
        seconds: How long it took.
        latencies_ms: One an answer, milliseconds.
        first_failure: What the first failed one was.
    """

    requests: int = 0
    failed: int = 0
    seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    first_failure: str = ""

    def fail(self, what: str) -> None:
        """Count a failure."""
        self.failed += 1
        self.first_failure = self.first_failure or what

    def summary(self) -> dict[str, float | int | str]:
        """Figures, without the single latencies."""
        found = asdict(self)
        ordered = sorted(found.pop("latencies_ms")) or [float("nan")]
        found["requests_per_s"] = self.requests / self.seconds if self.seconds else 0.0
        for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99)):
            found[name] = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        return found


def bodies(entities: int, population: int, *, seed: int) -> list[bytes]:
    """Request bodies that ask for random entities ``1 … population``."""
    rng = random.Random(seed)
    return [
        json.dumps({"entity_ids": [rng.randint(1, population) for _ in range(entities)]}).encode()
        for _ in range(_BODIES)
    ]


async def generate(url: str, requests: list[bytes], *, concurrency: int, seconds: float, most: int) -> Outcome:
    """Send requests for a while.

    Args:
        url: Of this machine.
        requests: Bodies, sent in turn.
        concurrency: Connections.
        seconds: How long.
        most: Requests at most.

    Raises:
        ValueError: If the address isn't this machine's, or a bound is exceeded.
    """
    parts = urlsplit(url)
    if parts.hostname not in LOOPBACK or parts.port is None:
        raise ValueError(f"{url!r}: only a loopback address with a port may be loaded")
    if not (0 < seconds <= MOST_SECONDS and 0 < most <= MOST_REQUESTS and 0 < concurrency <= MOST_CONNECTIONS):
        raise ValueError(f"at most {MOST_SECONDS:g} s, {MOST_REQUESTS} requests, {MOST_CONNECTIONS} connections")
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    payloads = [f"{head}Content-Length: {len(each)}\r\n\r\n".encode() + each for each in requests]
    outcome = Outcome()
    begin = time.perf_counter()
    turns = iter(range(most))
    end = begin + seconds
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(_client(parts.hostname, parts.port, payloads, turns, end, outcome))
    outcome.seconds = time.perf_counter() - begin
    return outcome


async def _client(
    host: str, port: int, payloads: list[bytes], turns: Iterator[int], end: float, outcome: Outcome
) -> None:
    """One client: a connection, and another one where that is lost, until there is no more to do."""
    loop = asyncio.get_running_loop()
    for turn in turns:
        if time.perf_counter() >= end:
            break
        connection = _Connection(payloads, turns, turn, end, outcome)
        try:
            async with asyncio.timeout(_ANSWER_LIMIT_S):
                transport, _ = await loop.create_connection(lambda here=connection: here, host, port)
        except OSError as error:  # TimeoutError is one
            connection.finish(f"{type(error).__name__}: {error}")
            continue
        while not connection.over.done():
            await asyncio.wait([connection.over], timeout=1.0)
            if time.perf_counter() > connection.begin + _ANSWER_LIMIT_S and not connection.over.done():
                connection.finish("TimeoutError: no answer")
        transport.abort()


class _Connection(asyncio.Protocol):
    """Sends a request, and the next as soon as its answer is there, which is counted and not kept.

    Args:
        payloads: Requests, sent in turn.
        turns: Whose turn is next.
        turn: Whose is the first.
        end: When to stop, seconds.
        outcome: Is told.

    Attributes:
        over: Done when there is no more to do here.
        begin: When the request was sent that waits for its answer, seconds.
    """

    def __init__(self, payloads: list[bytes], turns: Iterator[int], turn: int, end: float, outcome: Outcome) -> None:
        self._payloads, self._turns, self._turn, self._end, self._outcome = payloads, turns, turn, end, outcome
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.begin = time.perf_counter()
        self._head, self._status, self._closes = b"", b"", False
        self._left: int | None = None
        """Bytes of the answer that aren't here yet; None until its head is."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = transport
        self._send(self._turn)

    def data_received(self, data: bytes) -> None:
        """Count bytes of an answer; send the next request after the last."""
        if self._left is not None:
            self._left -= len(data)
        else:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._head[:end].lower()
            length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
            if not length.strip().isdigit():
                self.finish(f"no Content-Length: {head!r}")
                return
            self._status, self._closes = head.split(b" ", 2)[1], b"connection: close" in head
            self._left, self._head = end + 4 + int(length) - len(self._head), b""
        if self._left < 0:
            self.finish("more than its Content-Length")
        elif not self._left:
            self._answered()

    def connection_lost(self, exc: Exception | None) -> None:
        """A request that was sent gets no answer."""
        self.finish(f"ConnectionError: {exc or 'closed in the middle'}")

    def finish(self, failure: str | None) -> None:
        """Do no more; why, if something is wrong."""
        if not self.over.done():
            self.over.set_result(None)
            if failure is not None:
                self._outcome.fail(failure)

    def _send(self, turn: int) -> None:
        self._left, self.begin = None, time.perf_counter()
        self._transport.write(self._payloads[turn % len(self._payloads)])  # type: ignore[attr-defined] # asyncio's base has no write

    def _answered(self) -> None:
        now = time.perf_counter()
        self._outcome.latencies_ms.append((now - self.begin) * 1e3)
        if self._status == b"200":
            self._outcome.requests += 1
        else:
            self._outcome.fail(self._status.decode())
        turn = None if self._closes or now >= self._end else next(self._turns, None)
        if turn is None:
            self.finish(None)
        else:
            self._send(turn)


def run(url: str, *, seconds: float, **options: object) -> dict[str, Any]:
    """This program in a process of its own.

    Args:
        url: What is asked.
        seconds: How long.
        options: Its others, by name.

    Returns:
        The figures of `Outcome.summary`.

    Raises:
        SystemExit: If no request succeeded.
    """
    command = [sys.executable, __file__, url]
    command += [part for name, value in {"seconds": seconds, **options}.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds + 60)
    if done.returncode:
        raise SystemExit(f"no request succeeded: {done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def all_of(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run, refused unless every request succeeded.

    Raises:
        SystemExit: If one didn't.
    """
    if found["failed"]:
        raise SystemExit(f"{found['failed']} requests failed, the first: {found['first_failure']}")
    return found


def main() -> int:
    """Run as a program; exit code 1 if no request succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="http://127.0.0.1:PORT/predict")
    parser.add_argument("--bodies", type=Path, help="a file with a body a line; instead of --entities")
    parser.add_argument("--again", type=int, default=1, help="how often each of those bodies is sent at most")
    parser.add_argument("--entities", type=int, default=1, help="entities a request")
    parser.add_argument("--population", type=int, default=2_000, help="entity ids are 1 to this")
    parser.add_argument("--concurrency", type=int, default=16, help="connections")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long")
    parser.add_argument("--most", type=int, default=100_000, help="requests at most")
    parser.add_argument("--seed", type=int, default=1, help="which entities")
    given = parser.parse_args()
    if given.bodies is None:
        asked, most = bodies(given.entities, given.population, seed=given.seed), given.most
    else:
        asked = given.bodies.read_bytes().splitlines()
        most = min(given.most, given.again * len(asked))
    sending = generate(given.url, asked, concurrency=given.concurrency, seconds=given.seconds, most=most)
    outcome = asyncio.run(sending)
    print(json.dumps(outcome.summary()))
    return 0 if outcome.requests else 1


if __name__ == "__main__":
    sys.exit(main())
