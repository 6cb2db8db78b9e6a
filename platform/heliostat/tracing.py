"""Which request something was done for: W3C trace context, from a header to the log.

Source: W3C Trace Context, https://www.w3.org/TR/trace-context/, section 3.2.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass, field

HEADER = b"traceparent"

# Version, trace, parent, flags. Later versions may add fields; ``ff`` is none, and neither is an id of zeros.
_TRACEPARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


# Random texts of 32 digits, fetched many at once: each call of the system lets other threads go on meanwhile, which
# in a server with many takes 7 µs, not 0.4.
_RANDOM: deque[str] = deque()
_FETCHED = 4_096
os.register_at_fork(after_in_child=_RANDOM.clear)  # or parent and child would draw the same


def random_hex(n: int) -> str:
    """``n`` random bytes, at most 16, that nobody can guess, as ``2 n`` hexadecimal digits."""
    try:
        text = _RANDOM.pop()
    except IndexError:
        fetched = os.urandom(_FETCHED).hex()
        text = fetched[:32]
        _RANDOM.extend(fetched[at : at + 32] for at in range(32, len(fetched), 32))
    return text[: 2 * n]


@dataclass(frozen=True, slots=True)
class Trace:
    """The trace that a request belongs to, and when it arrived here.

    Attributes:
        trace_id: 32 hexadecimal digits.
        sampled: Whether the caller records the trace.
        span_id: Our own part of it, 16 hexadecimal digits.
        begun_s: When it arrived, on the clock of `time.perf_counter`.
    """

    trace_id: str
    sampled: bool = False
    span_id: str = field(default_factory=lambda: random_hex(8))
    begun_s: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, header: bytes | None) -> Trace:
        """The trace that a ``traceparent`` header names; a new one without it, or if it isn't valid."""
        found = None if header is None else _TRACEPARENT.fullmatch(header)
        if found is None or (found[1] == b"00" and found[5] is not None):
            return cls(random_hex(16))
        return cls(found[2].decode(), bool(int(found[4], 16) & 1))

    @property
    def header(self) -> bytes:
        """The value of ``traceparent`` for whoever is called, or who called."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}".encode()

    @property
    def age_ms(self) -> float:
        """How long ago it arrived, milliseconds."""
        return (time.perf_counter() - self.begun_s) * 1e3


CURRENT: ContextVar[Trace | None] = ContextVar("heliostat_trace", default=None)
"""The trace of the request that is being answered; None outside of one."""
