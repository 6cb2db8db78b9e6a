"""The commands that requests wait for, on connections that are kept for them.

A client's command layer, its pool and its timers take longer than the server does for a read:
150 of 170 µs in asyncio, 30 of 70 µs in a thread, of 100 keys. Here a command is packed at
once, sent on a connection that nobody else uses, and its reply is read by the client's own
parser; the client still connects, authenticates and encrypts. Only what may be repeated goes
this way, so that a connection which the server has closed meanwhile is found out by using it:
reads, and entries of a log whose reader keeps one of two that are the same.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hiredis
import redis
import redis.asyncio
import redis.exceptions

from heliostat.storage.scripts import Script
from heliostat.timers import Limits

try:
    from heliostat.storage import _packing
except ImportError:  # built without a compiler
    _packing = None  # type: ignore[assignment]


# KEYS: a stream, another key; ARGV: what the other one has to hold, an entry's only field, its value.
_XADD_WHILE = Script("""
if redis.call('GET', KEYS[2]) == ARGV[1] then return redis.call('XADD', KEYS[1], '*', ARGV[2], ARGV[3]) end
return false
""")


@dataclass(frozen=True, slots=True)
class Held:
    """A key, and what it has to hold."""

    key: str
    value: bytes


def _packed(keys: Sequence[str]) -> bytes:
    """The command MGET."""
    packed: bytes = hiredis.pack_command(("MGET", *keys))  # type: ignore[arg-type]  # its stub knows pairs only
    return packed


def _mget(keys: Sequence[str]) -> list[bytes]:
    packed = None if _packing is None else _packing.mget(keys)
    return [_packed(keys) if packed is None else packed]


def _script_call(how: bytes, program: bytes, arguments: Sequence[bytes], last: bytes) -> list[bytes]:
    """A script's call, its last argument, which may be large, as it is."""
    words = (how, program, *arguments)
    head = [b"*%d\r\n" % (len(words) + 1), *[b"$%d\r\n%b\r\n" % (len(word), word) for word in words]]
    return [b"".join([*head, b"$%d\r\n" % len(last)]), last, b"\r\n"]


class CommandPacker:
    """Packs any command: as a blocking client's own packer does, which looks at every argument twice."""

    def pack(self, *command: Any) -> list[bytes]:  # noqa: ANN401 - what the client sends
        """The command's bytes.

        Args:
            command: Its name and arguments: bytes, texts and numbers.

        Raises:
            redis.DataError: If an argument is something else.
        """
        name = command[0].encode() if isinstance(command[0], str) else command[0]
        if b" " in name:  # the client says "CONFIG GET"
            command = (*name.split(), *command[1:])
        try:
            return [hiredis.pack_command(command)]
        except TypeError:
            plain = tuple(bytes(each) if isinstance(each, bytearray | memoryview) else each for each in command)
        try:
            return [hiredis.pack_command(plain)]  # type: ignore[arg-type]  # as above
        except TypeError as error:
            raise redis.exceptions.DataError(str(error)) from error


class QuickCommands:
    """Reads, blocking. Safe to share between threads, and by processes that fork.

    Args:
        pool: Gives connections, and is used by nobody else.
    """

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool = pool
        self._idle: deque[Any] = deque()
        self._process = os.getpid()

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values of keys, None where there is none.

        Raises:
            redis.RedisError: If the server doesn't answer; a lost connection is opened once more.
        """
        if self._process != os.getpid():  # the parent's connections are still the parent's
            self._idle, self._process = deque(), os.getpid()
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._pool.get_connection()
        packed = _mget(keys)
        try:
            try:
                connection.send_packed_command(packed)
                values: list[bytes | None] = connection.read_response()
            except redis.ConnectionError:
                connection.disconnect()
                connection.send_packed_command(packed)
                values = connection.read_response()
            return values
        finally:  # after an error it's disconnected, and connects again when it's used
            if connection.should_reconnect():  # says the server, or an error in between
                connection.disconnect()
            self._idle.append(connection)

    def close(self) -> None:
        """Close all connections."""
        self._pool.disconnect()


class AsyncQuickCommands:
    """The same for asyncio, on one loop.

    Args:
        pool: Gives connections without a timeout of their own, and is used by nobody else.
        timeout_s: For an answer.
    """

    def __init__(self, pool: redis.asyncio.ConnectionPool, timeout_s: float) -> None:
        self._pool: Any = pool
        self._limits = Limits(timeout_s)
        self._idle: deque[Any] = deque()

    async def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """As `QuickCommands.mget`."""
        values: list[bytes | None] = await self._ask(_mget(keys))
        return values

    async def xadd(self, stream: str, field: bytes, value: bytes) -> bytes:
        """Append an entry to a stream, twice if the connection is lost meanwhile; returns its id.

        Raises:
            redis.RedisError: If the server doesn't take it; a lost connection is opened once more.
        """
        # Packed by hand: values are large, and the client's packer copies them twice.
        name = stream.encode()
        head = b"*5\r\n$4\r\nXADD\r\n$%d\r\n%b\r\n$1\r\n*\r\n$%d\r\n%b\r\n$%d\r\n"
        entry: bytes = await self._ask([head % (len(name), name, len(field), field, len(value)), value, b"\r\n"])
        return entry

    async def xadd_while(self, held: Held, stream: str, field: bytes, value: bytes) -> bytes | None:
        """As `xadd`, if a key holds what it has to at that instant; else nothing is appended, and it gives None.

        Raises:
            redis.RedisError: As there.
        """
        arguments = (b"2", stream.encode(), held.key.encode(), held.value, field)
        entry: bytes | None
        try:
            entry = await self._ask(_script_call(b"EVALSHA", _XADD_WHILE.sha.encode(), arguments, value))
        except redis.exceptions.NoScriptError:  # the server was restarted, or is new
            entry = await self._ask(_script_call(b"EVAL", _XADD_WHILE.text.encode(), arguments, value))
        return entry

    async def _ask(self, packed: Sequence[bytes]) -> Any:  # noqa: ANN401 - the command's own
        try:
            return await self._limits.keep(self._answer(packed))
        except TimeoutError:
            raise redis.exceptions.TimeoutError(f"no answer within {self._limits.delay_s:g} s") from None

    async def _answer(self, packed: Sequence[bytes]) -> Any:  # noqa: ANN401 - the command's own
        connection = self._idle.pop() if self._idle else await self._pool.get_connection()
        try:
            try:
                await connection.send_packed_command(packed)
                return await connection.read_response()
            except redis.ConnectionError:
                await connection.disconnect(nowait=True)
                await connection.send_packed_command(packed)
                return await connection.read_response()
        finally:  # after an error, or when nobody waits any more, it's disconnected
            if connection.should_reconnect():
                await connection.disconnect(nowait=True)
            self._idle.append(connection)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.disconnect()
