"""API keys in the catalog: made, listed, revoked, and read for replicas.

Their instants are those of the real clock, whatever time `clock` pretends: a replay mustn't keep a key alive.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, Self

from heliostat.clock import Clock, SystemClock
from heliostat.errors import InvalidValueError, KeyNameTakenError, UnknownKeyError
from heliostat.serving.access import Caller, KnownKey, NewKey, Scope, granted, new_key
from heliostat.storage.catalog import Catalog
from heliostat.storage.catalog_tables import ApiKeyRow
from heliostat.workspace import Workspace

_NAME: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


def works(row: ApiKeyRow, now_us: int) -> bool:
    """Whether a key is accepted at an instant."""
    return row.revoked_us is None and (row.expires_us is None or now_us < row.expires_us)


class KeyBook:
    """All API keys of a project.

    Args:
        catalog: Opens where they are kept, when first used.
        clock: Tells the real time.
    """

    def __init__(self, catalog: Callable[[], Catalog], clock: Clock) -> None:
        self._catalog, self.clock = catalog, clock

    @classmethod
    def of(cls, workspace: Workspace) -> Self:
        """A workspace's keys, by the real clock."""
        return cls(lambda: workspace.catalog, SystemClock())

    def create(self, name: str, scopes: Sequence[str], *, lasts_us: int | None = None) -> NewKey:
        """Make a key. What is given back is the only copy: the catalog keeps a hash.

        Args:
            name: Whose it is; free again once it was revoked or has expired.
            scopes: What it allows, at least one.
            lasts_us: How long, microseconds; None: until it is revoked.

        Raises:
            InvalidValueError: If the name, a scope or the duration can't be used.
            KeyNameTakenError: If a key of that name works.
        """
        if not _NAME.match(name):
            raise InvalidValueError("the key's name", name, "up to 64 letters, digits, dots, dashes and underscores")
        known = tuple(Scope)
        for scope in scopes:
            if scope not in known:
                raise InvalidValueError("the scope", scope, f"one of {', '.join(known)}")
        if not scopes:
            raise InvalidValueError("the scopes", "", f"at least one of {', '.join(known)}")
        if lasts_us is not None and lasts_us <= 0:
            raise InvalidValueError("the key's duration", str(lasts_us), "a positive one")
        made, now_us = new_key(), self.clock.now_us()
        row = ApiKeyRow(
            id=made.id,
            name=name,
            scopes=tuple(sorted(set(map(str, scopes)))),
            digest=made.digest,
            last_four=made.last_four,
            created_us=now_us,
            expires_us=None if lasts_us is None else now_us + lasts_us,
        )
        with self._catalog().write() as rows:
            if any(each.name == name and works(each, now_us) for each in rows.api_keys()):
                raise KeyNameTakenError(name)
            rows.add_api_key(row)
        return made

    def list(self) -> tuple[ApiKeyRow, ...]:
        """All keys there ever were, oldest first."""
        with self._catalog().read() as rows:
            return rows.api_keys()

    def revoke(self, name: str) -> int:
        """Stop every key of a name that isn't revoked yet; tells how many that were.

        Raises:
            UnknownKeyError: If there is none.
        """
        with self._catalog().write() as rows:
            alive = [each for each in rows.api_keys() if each.revoked_us is None]
            stopped = [each for each in alive if each.name == name]
            if not stopped:
                raise UnknownKeyError(name, tuple(sorted({each.name for each in alive})))
            rows.revoke_api_keys([each.id for each in stopped], revoked_us=self.clock.now_us())
        return len(stopped)

    def known(self) -> tuple[KnownKey, ...]:
        """What a replica has to know of all of them."""
        return tuple(
            KnownKey(
                id=each.id,
                caller=Caller(each.name, granted(each.scopes)),
                digest=bytes.fromhex(each.digest),
                expires_us=each.expires_us,
                revoked=each.revoked_us is not None,
            )
            for each in self.list()
        )
