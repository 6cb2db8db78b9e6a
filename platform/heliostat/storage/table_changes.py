"""What has been written to a Delta table between two of its versions, told by its log alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

import orjson

from heliostat.storage.delta import Table

_MOST_COMMITS = 2_000


@dataclass(frozen=True)
class NewFile:
    """A file that brought new rows.

    Attributes:
        path: Relative to the table; the file may have been merged with others since.
        version: Of the commit that added it.
    """

    path: str
    version: int


@dataclass(frozen=True)
class TableChanges:
    """What changed, by the value of the partition column.

    Attributes:
        added: Files that brought new rows.
        rewritten: The last version that took rows away, where one did.
    """

    added: Mapping[str, tuple[NewFile, ...]]
    rewritten: Mapping[str, int]

    def since(self, value: str, version: int) -> tuple[str, ...] | None:
        """Paths of the files that brought new rows to a partition after a version; None if rows went."""
        if self.rewritten.get(value, -1) > version:
            return None
        return tuple(each.path for each in self.added.get(value, ()) if each.version > version)


def table_changes(place: Table, *, after: int, through: int) -> TableChanges | None:
    """What the commits after one version, up to another, have changed. Merging files changes nothing.

    Args:
        place: The table.
        after: The first version that isn't looked at; -1: none.
        through: The last one that is.

    Returns:
        The changes; None if they can't be told, since they are too many or the log was cleaned up.
    """
    if through - after > _MOST_COMMITS:
        return None
    filesystem = place.filesystem()
    added: dict[str, list[NewFile]] = {}
    rewritten: dict[str, int] = {}
    for version in range(after + 1, through + 1):
        try:
            with filesystem.open_input_stream(f"_delta_log/{version:020d}.json") as file:
                actions = [orjson.loads(line) for line in file.read().splitlines() if line]
        except FileNotFoundError:
            return None
        for action in actions:
            for kind in ("add", "remove"):
                change = action.get(kind)
                if change is None or not change.get("dataChange", True):
                    continue
                value = str((change.get("partitionValues") or {}).get(place.partition))
                if kind == "add":
                    added.setdefault(value, []).append(NewFile(unquote(change["path"]), version))
                else:
                    rewritten[value] = version
    return TableChanges({value: tuple(files) for value, files in added.items()}, rewritten)
