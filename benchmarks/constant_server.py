"""The least that a server can do: the same answer to every request, as soon as its body is there.

    python benchmarks/constant_server.py --port 9002

What `benchmarks/load.py` reaches against it is what that generator can send at most.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import uvloop

_BODY = b'{"predictions": [0.5]}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(_BODY) + _BODY
_LENGTH = b"content-length:"


class Constant(asyncio.Protocol):
    """One connection: requests come one after another, each is answered once it is whole."""

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what answers are written to."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer what is whole."""
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[:end].lower()
            length = int(head.partition(_LENGTH)[2].partition(b"\r\n")[0] or 0)
            if len(self._received) < end + 4 + length:
                return
            self._received = self._received[end + 4 + length :]
            self._transport.write(ANSWER)  # type: ignore[attr-defined] # asyncio's base has no write


async def serve(port: int) -> None:
    """Serve on the loopback address until the process ends."""
    server = await asyncio.get_running_loop().create_server(Constant, "127.0.0.1", port)
    await server.serve_forever()


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(serve(parser.parse_args().port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
