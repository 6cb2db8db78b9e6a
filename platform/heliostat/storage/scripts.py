"""Programs that run inside the online server."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Script:
    """A server-side program and the name that the server caches it by."""

    text: str

    @cached_property
    def sha(self) -> str:
        """What EVALSHA calls it."""
        return hashlib.sha1(self.text.encode()).hexdigest()  # noqa: S324 - the protocol's choice, not security
