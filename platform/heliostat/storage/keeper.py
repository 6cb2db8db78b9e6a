"""The keeper: parent process of one embedded server, which ends it when its last user has gone.

A user that is killed can't clean up behind itself, but the kernel drops its lock. So every
user holds a shared lock on one file, and the keeper waits for the exclusive one.

It runs as a program of its own, by path and isolated, so it imports the standard library
only and starts in 20 ms. The locks' names and order, which `embedded` shares, live here:

    lifecycle.lock   exclusive while somebody starts or stops the server; taken first
    users.lock       shared by every user; exclusive to prove that there is none
    server.lock      inherited by the server and its keeper: held means running, whatever
                     a stale pid says
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

LIFECYCLE_LOCK = "lifecycle.lock"
USERS_LOCK = "users.lock"
SERVER_LOCK = "server.lock"
RECORD = "server.json"
TERMINATE_TIMEOUT_S = 20.0


@contextlib.contextmanager
def locked(path: Path, *, blocking: bool = True) -> Iterator[bool]:
    """Hold the exclusive lock on a file.

    Args:
        path: The lock file; created when absent.
        blocking: Wait for it, or give up at once.

    Yields:
        Whether the lock is held; always true when blocking.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(handle)


def read_record(directory: Path) -> dict[str, str | int | bool] | None:
    """What the server's starter wrote down: pid, socket, token, keep; None without a readable record."""
    try:
        record = json.loads((directory / RECORD).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def remove_traces(directory: Path, socket: Path) -> None:
    """Remove the record and the socket, with its private directory, of a server that has ended."""
    with contextlib.suppress(OSError):
        socket.unlink(missing_ok=True)
        socket.parent.rmdir()  # nothing but the socket was in it
    (directory / RECORD).unlink(missing_ok=True)


def _end_when_unused(directory: Path, socket: Path, server: subprocess.Popen[bytes], ending: threading.Event) -> None:
    while True:
        try:
            with locked(directory / USERS_LOCK):
                pass  # nobody held it for a moment; who comes next holds the lifecycle lock while coming
            with locked(directory / LIFECYCLE_LOCK), locked(directory / USERS_LOCK, blocking=False) as unused:
                record = read_record(directory)
                if record is not None and record.get("keep"):
                    return
                if unused:
                    _end(directory, socket, server, ending)
                    return
        except FileNotFoundError:
            _end(directory, socket, server, ending)  # the data are gone with their directory: nobody finds it again
            return


def _end(directory: Path, socket: Path, server: subprocess.Popen[bytes], ending: threading.Event) -> None:
    ending.set()
    server.terminate()
    try:
        server.wait(TERMINATE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    remove_traces(directory, socket)


def main(directory: Path, socket: Path, server_lock: int, command: list[str]) -> int:
    """Run the server until it ends by itself, is stopped, or has no user left.

    Args:
        directory: The server's data directory, where the locks are.
        socket: Where the server listens.
        server_lock: Inherited descriptor that holds the server's lock.
        command: The server's program and arguments.

    Returns:
        The server's exit code.
    """
    server = subprocess.Popen(command, pass_fds=[server_lock], stdin=subprocess.DEVNULL)  # noqa: S603 - by embedded.py
    ending = threading.Event()
    watcher = threading.Thread(target=_end_when_unused, args=(directory, socket, server, ending), daemon=True)
    watcher.start()
    code = server.wait()
    if ending.is_set():
        watcher.join()
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
