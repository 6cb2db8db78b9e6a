"""How bytes go for good: rows out of Delta tables and their old files, keys out of the server and its files.

Taking a row out of a Delta table writes its file anew without it, in one commit; the old file stays
for time travel until it is vacuumed. Taking an entry out of a stream marks it, and an append-only
file repeats everything that was ever said. So each has a second step here, after which a search
of the bytes finds nothing.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import redis
import redis.exceptions
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction
from numpy.typing import NDArray

from heliostat.errors import TableCommitError
from heliostat.storage.delta import Commit, Table, arrow_schema
from heliostat.storage.online_store import OnlineConfig
from heliostat.storage.places import one_line
from heliostat.storage.scripts import Script

_ABANDONED_HOURS: Final = 24
_DELETIONS_AT_ONCE: Final = 8
_REWRITE_TIMEOUT_S: Final = 600.0
_POLL_S: Final = 0.02

# ── Delta tables ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Doomed:
    """Which rows are to go.

    Attributes:
        columns: What has to be read to tell.
        rows: From a table with these columns, ``n`` rows, to whether each goes, shape ``(n,)``.
        files: From a row of `Table.files` to whether the file may hold such rows.
        whole: Whether all of a file's rows go; then it isn't read.
    """

    columns: tuple[str, ...]
    rows: Callable[[pa.Table], NDArray[np.bool_]]
    files: Callable[[Mapping[str, Any]], bool] = field(default=lambda _: True)
    whole: Callable[[Mapping[str, Any]], bool] = field(default=lambda _: False)


@dataclass(frozen=True)
class Erased:
    """What was taken out of tables.

    Attributes:
        rows: Rows that went.
        files: Files that were written anew without them, or taken out whole.
    """

    rows: int = 0
    files: int = 0

    def __add__(self, other: Erased) -> Erased:
        return Erased(self.rows + other.rows, self.files + other.files)


def doomed_rows(place: Table, doomed: Doomed, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of the rows that are to go, file by file; a table that doesn't exist has none."""
    current = place.open()
    if current is None:
        return
    for file in place.files(current).to_pylist():
        if doomed.files(file):
            names = list(dict.fromkeys((*doomed.columns, *columns)))
            held = place.read(current, [file["path"]], columns=names)
            found = held.filter(pa.array(doomed.rows(held)))
            if found.num_rows:
                yield found.select(list(columns))


def erase_rows(place: Table, doomed: Doomed) -> Erased:
    """Take rows out of a table in one commit, whoever else writes; only their files are written anew.

    Readers see all of them or none. Order, statistics and partition of the other rows stay.

    Args:
        place: The table; one that doesn't exist is left alone.
        doomed: Which rows.

    Raises:
        TableCommitError: If the table refuses; then nothing has changed.
    """
    if place.open() is None:
        return Erased()
    rewritten: dict[str, tuple[int, AddAction | None]] = {}

    def prepare(current: DeltaTable) -> Commit | None:
        held = {file["path"]: file for file in place.files(current).to_pylist() if doomed.files(file)}
        for path in [path for path in rewritten if path not in held]:
            _, add = rewritten.pop(path)  # somebody else has merged it with others meanwhile
            place.discard([] if add is None else [add])
        for path in [path for path in held if path not in rewritten]:
            rewritten[path] = _without(place, current, held[path], doomed)
        changed = {path: add for path, (rows, add) in rewritten.items() if rows}
        if not changed:
            return None
        return Commit(
            adds=[add for add in changed.values() if add is not None],
            removes=[
                place.removal(
                    held[path],
                    deleted_ms=int(held[path]["modification_time"]) if add is None else add.modification_time,
                )
                for path, add in changed.items()
            ],
        )

    place.commit(arrow_schema(place.current()), prepare)
    counts = [rows for rows, _ in rewritten.values() if rows]
    return Erased(sum(counts), len(counts))


def _without(
    place: Table, current: DeltaTable, file: Mapping[str, Any], doomed: Doomed
) -> tuple[int, AddAction | None]:
    """How many rows of a file go, and the file of those that stay; None if nothing goes or nothing stays."""
    path = file["path"]
    if doomed.whole(file):
        return int(file["num_records"]), None
    gone = doomed.rows(place.read(current, [path], columns=list(doomed.columns)))
    n_gone = int(gone.sum())
    if n_gone == 0 or n_gone == len(gone):
        return n_gone, None
    names = [name for name in arrow_schema(current).names if name != place.partition]
    rows = place.read(current, [path], columns=names).filter(pa.array(~gone))
    value = None if place.partition is None else file[f"partition.{place.partition}"]
    ranges = [name.removeprefix("min.") for name, low in file.items() if name.startswith("min.") and low is not None]
    added = place.write(
        rows,
        value=None if value is None else str(value),
        ranges=[name for name in ranges if name in names],
        repetitive=_dictionaries(place.filesystem(), path),
    )
    return n_gone, added


def _dictionaries(filesystem: pafs.FileSystem, path: str) -> list[str]:
    """The columns that a file keeps as dictionaries."""
    with filesystem.open_input_file(path) as source:
        metadata = pq.ParquetFile(source).metadata
        if metadata.num_row_groups == 0:
            return []
        group = metadata.row_group(0)
        columns = [group.column(at) for at in range(group.num_columns)]
        return [
            each.path_in_schema for each in columns if each.has_dictionary_page and "." not in each.path_in_schema
        ]


def vacuum(place: Table, *, hours: int = 0, exclusive: bool = False) -> int:
    """Delete the files that no longer belong to a table: it can't be read as it was at such versions then.

    Files that somebody has written and not committed yet stay, unless they are older than a day.

    Args:
        place: The table; one that doesn't exist is left alone.
        hours: Files that belonged to it so long ago or less stay.
        exclusive: Nothing writes to the table now: uncommitted files go as well.

    Returns:
        How many files went.

    Raises:
        TableCommitError: If they can't be deleted.
    """
    table = place.open()
    if table is None:
        return 0
    abandoned = 0 if exclusive else max(hours, _ABANDONED_HOURS)
    try:
        # Delta names all files that the table's history ever let go, those that are long deleted as well.
        named = {
            *table.vacuum(hours, enforce_retention_duration=False),
            *table.vacuum(abandoned, enforce_retention_duration=False, full=True),
        }
        filesystem = place.filesystem()
        there = (each.path.lstrip("/") for each in filesystem.get_file_info(pafs.FileSelector("", recursive=True)))
        found = [path for path in there if path in named]
        with ThreadPoolExecutor(_DELETIONS_AT_ONCE) as pool:
            list(pool.map(lambda path: _delete(filesystem, path), found))
    except (DeltaError, OSError) as error:
        raise TableCommitError(place.uri, one_line(error)) from error
    return len(found)


def _delete(filesystem: pafs.FileSystem, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # somebody else was quicker
        filesystem.delete_file(path)


def uncommitted_with(place: Table, doomed: Doomed) -> int:
    """How many files below a table hold doomed rows without belonging to it.

    A writer that was killed leaves such files, and one at work now has them for a moment.
    """
    current = place.open()
    if current is None:
        return 0
    known = set(place.files(current).column("path").to_pylist())
    filesystem = place.filesystem()
    found = 0
    for info in filesystem.get_file_info(pafs.FileSelector("", recursive=True)):
        path = info.path.lstrip("/")
        if path.endswith(".parquet") and not path.startswith("_delta_log/") and path not in known:
            try:
                with filesystem.open_input_file(path) as source:
                    held = pq.read_table(source, columns=list(doomed.columns))
                found += bool(doomed.rows(held).any())
            except (OSError, pa.ArrowException, KeyError):
                continue  # half written, or gone by now: nothing that could be read
    return found


# ── The server ──────────────────────────────────────────────────────────────────────

# A stream's entries stay in memory, marked, as long as their block has one that isn't. KEYS: stream.
_REWRITE_STREAM: Final = Script("""
local entries = redis.call('XRANGE', KEYS[1], '-', '+')
if #entries == 0 then
  return 0
end
local info, last = redis.call('XINFO', 'STREAM', KEYS[1]), nil
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then
    last = info[i + 1]
  end
end
redis.call('DEL', KEYS[1])
for _, entry in ipairs(entries) do
  redis.call('XADD', KEYS[1], entry[1], unpack(entry[2]))
end
redis.call('XSETID', KEYS[1], last)
return #entries
""")


class ServerEraser:
    """Takes keys and entries out of the online store's server. Use it as a context manager.

    Args:
        config: How to reach the server.
    """

    def __init__(self, config: OnlineConfig) -> None:
        self.config, self.keys = config, config.keys
        with self.config.reported():
            self.client = config.connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def find(self, part: str = "") -> list[str]:
        """The project's keys that have a text in them; all of them without one.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        pattern = f"{_glob(self.keys.root)}:*{_glob(part)}*" if part else f"{_glob(self.keys.root)}:*"
        with self.config.reported():
            return sorted({_text(key) for key in self.client.scan_iter(match=pattern, count=1_000)})

    def delete(self, keys: Sequence[str]) -> int:
        """Delete keys; returns how many there were.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        gone = 0
        for first in range(0, len(keys), 1_000):
            with self.config.reported(), self.client.pipeline(transaction=False) as pipeline:
                for key in keys[first : first + 1_000]:
                    pipeline.unlink(key)
                gone += sum(pipeline.execute())
        return gone

    def remember(self, key: str, members: Sequence[str]) -> None:
        """Add members to a set that outlives this process."""
        if members:
            with self.config.reported():
                self.client.sadd(key, *members)

    def remembered(self, key: str) -> list[str]:
        """The members of such a set."""
        with self.config.reported():
            return sorted(_text(each) for each in self.client.smembers(key))

    def delete_entries(self, stream: str, concerns: Callable[[bytes], bool]) -> int:
        """Delete entries of a stream by what they hold; returns how many.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        with self.config.reported():
            found = [
                entry
                for entry, fields in self.client.xrange(stream)
                if any(concerns(value) for value in fields.values())
            ]
            if found:
                self.client.xdel(stream, *found)
        return len(found)

    def rewrite_streams(self, streams: Sequence[str]) -> None:
        """Write streams anew, so that nothing of deleted entries stays; ids, order and waiting entries do.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        with self.config.reported():
            for stream in streams:
                self.client.eval(_REWRITE_STREAM.text, 1, stream)

    def rewrite_files(self) -> tuple[str, ...]:
        """Let every primary write its append-only file, and its snapshot if it makes any, anew; waits for them.

        Returns:
            What couldn't be done, as sentences: a server may refuse, replicas and backups are somebody else's.

        Raises:
            OnlineStoreUnavailableError: If a server doesn't answer.
        """
        problems: list[str] = []
        with self.config.reported():
            for name, node in self._nodes():
                try:
                    self._rewrite_node_files(node)
                except (redis.exceptions.ResponseError, TimeoutError) as error:
                    problems.append(f"{name} doesn't write its files anew: {error}")
        return tuple(problems)

    def _nodes(self) -> Iterator[tuple[str, Any]]:
        if not self.config.cluster:
            yield "the server", self.client
            return
        for each in self.client.get_primaries():
            yield f"node {each.host}:{each.port}", self.client.get_redis_connection(each)

    def _rewrite_node_files(self, node: Any) -> None:  # noqa: ANN401 - redis' clients share no type
        if node.info("persistence")["aof_enabled"]:
            _settle(node, "aof_rewrite_in_progress", "aof_rewrite_scheduled", "rdb_bgsave_in_progress")
            node.bgrewriteaof()
            _settle(node, "aof_rewrite_in_progress", "aof_rewrite_scheduled")
            if node.info("persistence")["aof_last_bgrewrite_status"] != "ok":
                raise TimeoutError("the last rewrite of its append-only file failed")
        if node.config_get("save").get("save"):
            _settle(node, "rdb_bgsave_in_progress")
            node.bgsave()
            _settle(node, "rdb_bgsave_in_progress")


def _settle(node: Any, *flags: str) -> None:  # noqa: ANN401 - as above
    deadline_s = time.monotonic() + _REWRITE_TIMEOUT_S
    while any(int(node.info("persistence").get(flag, 0)) for flag in flags):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"it isn't done after {_REWRITE_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)


def _glob(text: str) -> str:
    """A text as a pattern that matches nothing else."""
    return re.sub(r"([\\*?\[\]^-])", r"\\\1", text)


def _text(key: bytes | str) -> str:
    return key.decode(errors="surrogateescape") if isinstance(key, bytes) else key
