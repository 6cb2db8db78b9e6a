"""Free ports of this machine, for servers that are started by whoever asks for them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import random
import socket

# Above those of Ray's workers, below those of its replicas and of a system's connections.
_PORTS = range(20_000, 30_000)
_given: set[int] = set()
# Not `random`'s own: whoever seeds that, as tests do, would have several processes find the same ports free.
_random = random.SystemRandom()


def free_ports(host: str, count: int) -> list[int]:
    """Ports of an address at which nobody listens.

    None that a system would choose by itself, unless it is told to: until somebody listens there, it might give it
    to any connection.

    Raises:
        OSError: If there aren't as many; or the address isn't this machine's.
    """
    # What was given once and isn't listened at yet isn't given again, as long as there are others.
    candidates = sorted(_random.sample(_PORTS, len(_PORTS)), key=_given.__contains__)
    found = list(itertools.islice((port for port in candidates if _is_free(host, port)), count))
    if len(found) < count:
        raise OSError(f"{host} has no {count} free ports from {_PORTS[0]} to {_PORTS[-1]}")
    _given.update(found)
    return found


def _is_free(host: str, port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        return True
