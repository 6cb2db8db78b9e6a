"""Clients that take their time: each is one request over one socket with small buffers."""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

import orjson


class SlowClients:
    """Slow clients of one server.

    Args:
        url: Where ``POST /predict`` is served.
        expected: How many clients there will be; `connected` is set when all are.
    """

    def __init__(self, url: str, *, expected: int) -> None:
        self._address = urlsplit(url)
        self._left = expected
        self.connected = asyncio.Event()

    async def sender(self) -> str:
        """Sends its body a byte at a time; the answer's status."""
        body = orjson.dumps({"entity_ids": [1]})
        reader, writer = await self._connection(len(body))
        for at in range(len(body)):
            await asyncio.sleep(0.25)
            writer.write(body[at : at + 1])
        return await self._status(reader, writer)

    async def reader(self) -> str:
        """Reads a long answer slowly."""
        body = orjson.dumps({"entity_ids": list(range(300))})
        reader, writer = await self._connection(len(body))
        writer.write(body)
        return await self._status(reader, writer, pause_s=0.25)

    async def silent(self) -> str:
        """Announces a body and sends none."""
        return await self._status(*await self._connection(100))

    async def _connection(self, length: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        made.setblocking(False)
        await asyncio.get_running_loop().sock_connect(made, (self._address.hostname, self._address.port))
        reader, writer = await asyncio.open_connection(sock=made, limit=1_024)
        head = f"POST /predict HTTP/1.1\r\nHost: {self._address.netloc}\r\nContent-Length: {length}\r\n\r\n"
        writer.write(head.encode())
        self._left -= 1
        if not self._left:
            self.connected.set()
        return reader, writer

    @staticmethod
    async def _status(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, pause_s: float = 0.0) -> str:
        first = await reader.readline()
        length = 0
        while (line := await reader.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        while length > 0:
            await asyncio.sleep(pause_s)
            read = await reader.read(4_096)
            assert read, "an answer broke off"
            length -= len(read)
        writer.close()
        return first.split()[1].decode()
