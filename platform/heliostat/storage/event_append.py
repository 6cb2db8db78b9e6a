"""How events get into one table of the event log: spooled by bucket, deduplicated, sorted, committed.

Memory holds one bucket at a time for each thread, however much is appended.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.transaction import AddAction
from numpy.typing import NDArray

from heliostat.errors import StaleProgressError
from heliostat.schema import BUCKET, ID_HASH, INGESTED
from heliostat.storage.delta import Commit, Progress, Table, arrow_schema

IntArray = NDArray[np.int64]

_SPOOL_BYTES = 256_000_000
_THREADS = min(4, os.cpu_count() or 1)


class HashCache:
    """Sorted id hashes of files, which never change; the least used go first.

    Args:
        limit: How many hashes are kept, 8 bytes each.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._kept: OrderedDict[str, IntArray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, file: str) -> IntArray | None:
        """The hashes of a file, if they are kept."""
        with self._lock:
            if file in self._kept:
                self._kept.move_to_end(file)
            return self._kept.get(file)

    def put(self, file: str, hashes: IntArray) -> None:
        """Keep the hashes of a file."""
        with self._lock:
            if file not in self._kept:
                self._kept[file] = hashes
                self._held += len(hashes)
            while self._held > self._limit:
                _, dropped = self._kept.popitem(last=False)
                self._held -= len(dropped)


class Spool:
    """Rows by bucket, in the order they came; in memory first, in a temporary folder beyond a limit.

    Args:
        limit_bytes: How much stays in memory.
    """

    def __init__(self, limit_bytes: int = _SPOOL_BYTES) -> None:
        self._limit_bytes, self._held_bytes = limit_bytes, 0
        self._held: dict[int, list[pa.Table]] = {}
        self._spilled: dict[int, list[Path]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.rows: dict[int, int] = {}

    def add(self, rows: pa.Table, buckets: NDArray[np.int32]) -> None:
        """Take rows.

        Args:
            rows: ``n`` rows; always the same columns.
            buckets: The bucket of each, shape ``(n,)``.
        """
        if rows.num_rows == 0:
            return
        order = np.argsort(buckets.astype(np.uint16), kind="stable")  # 16 bits: a radix sort, ten times as quick
        ordered = rows.take(pa.array(order)).combine_chunks()
        found, begins = np.unique(buckets[order], return_index=True)
        for bucket, begin, end in zip(found.tolist(), begins, np.append(begins[1:], len(order)), strict=True):
            self._held.setdefault(bucket, []).append(ordered.slice(begin, end - begin))
            self.rows[bucket] = self.rows.get(bucket, 0) + int(end - begin)
        self._held_bytes += ordered.nbytes
        if self._held_bytes > self._limit_bytes:
            self._spill()

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="heliostat-spool-")
        for bucket, parts in self._held.items():
            files = self._spilled.setdefault(bucket, [])
            path = Path(self._folder.name, f"{bucket}-{len(files)}.arrow")
            whole = pa.concat_tables(parts)
            with pa.ipc.new_file(str(path), whole.schema) as sink:
                sink.write_table(whole)
            files.append(path)
        self._held, self._held_bytes = {}, 0

    def load(self, bucket: int) -> pa.Table:
        """One bucket's rows, in the order they came."""
        parts: list[pa.Table] = []
        for path in self._spilled.get(bucket, ()):
            with pa.memory_map(str(path)) as mapped:
                parts.append(pa.ipc.open_file(mapped).read_all())
        return pa.concat_tables([*parts, *self._held.get(bucket, ())])

    def close(self) -> None:
        """Forget all rows."""
        self._held, self._spilled, self.rows = {}, {}, {}
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class EntityAppend:
    """One append to one entity's table.

    Args:
        table: Where to.
        schema: The table's columns.
        event_time: Column to sort by.
        event_id: Column that names an event.
        spool: The rows, by bucket.
        hashes: Id hashes of files that are known already.
        progress: Streams that this applies.
    """

    def __init__(
        self,
        *,
        table: Table,
        schema: pa.Schema,
        event_time: str,
        event_id: str,
        spool: Spool,
        hashes: HashCache,
        progress: Progress | None,
    ) -> None:
        self._table, self._schema, self._spool = table, schema, spool
        self._event_time, self._event_id = event_time, event_id
        self._hashes, self._progress = hashes, progress
        # By bucket: the file that is written for it (None: nothing new), and what it was checked against.
        self._written: dict[int, AddAction | None] = {}
        self._rows: dict[int, int] = {}
        self._checked: dict[int, frozenset[str]] = {}
        self._repeated: list[pa.Table] = []

    @property
    def repeated(self) -> pa.Table:
        """Rows of streams that the table had already."""
        empty = self._schema.empty_table().drop_columns([BUCKET])
        return pa.concat_tables([*self._repeated, empty], promote_options="default")

    @property
    def accepted(self) -> int:
        """Rows that are new."""
        return sum(self._rows.values())

    def commit(self) -> int:
        """Check, write and commit.

        Returns:
            The version that holds the rows.
        """
        try:
            return self._table.commit(self._schema, self._prepare)
        except StaleProgressError:
            # Raised before anything was sent. After other failures the files stay, seen by nobody:
            # to delete what might have been committed after all would be worse.
            self._table.discard(self._adds())
            raise

    def _adds(self) -> list[AddAction]:
        return [add for add in self._written.values() if add is not None]

    def _prepare(self, table: DeltaTable) -> Commit | None:
        files = self._table.files(table)
        by_bucket: dict[int, list[str]] = {}
        of_file = files.column(f"partition.{BUCKET}").to_pylist() if files.num_rows else []
        for bucket, path in zip(of_file, files.column("path").to_pylist(), strict=True):
            by_bucket.setdefault(bucket, []).append(path)
        _in_threads(
            lambda bucket: self._prepare_bucket(table, bucket, by_bucket.get(bucket, [])), [*self._spool.rows]
        )
        adds = self._adds()
        if not adds and self._progress is None:
            return None
        return Commit(adds=adds, progress=self._progress)

    def _prepare_bucket(self, table: DeltaTable, bucket: int, present: Sequence[str]) -> None:
        """Write the bucket's new rows; on a repetition, drop what others have appended meanwhile."""
        unchecked = sorted(set(present) - self._checked.get(bucket, frozenset()))
        before = self._written.get(bucket)
        self._checked[bucket] = frozenset(present)
        if bucket not in self._written:
            rows = self._spool.load(bucket)
            kept = first_of_each(rows, self._event_id)
        elif before is None or not unchecked:
            return
        else:
            stored = arrow_schema(table)
            names = [name for name in stored.names if name != BUCKET]
            rows = self._table.read(table, [before.path], columns=names)
            kept = np.arange(rows.num_rows)
        known = self._known(table, unchecked, rows.select([self._event_id, ID_HASH]).take(pa.array(kept)))
        if self._progress is not None and known.any():
            self._repeated.append(rows.take(pa.array(kept[known])))
        new = kept[~known]
        if before is not None:
            if len(new) == rows.num_rows:
                return
            self._table.discard([before])
        self._rows[bucket] = len(new)
        self._written[bucket] = self._write(bucket, rows, new) if len(new) else None

    def _write(self, bucket: int, rows: pa.Table, new: IntArray) -> AddAction:
        times = rows.column(self._event_time).cast(pa.int64()).to_numpy()[new]
        if len(new) > 1 and (np.diff(times) < 0).any():
            # The order of equal times means nothing, and a stable sort takes ten times as long.
            new = new[np.argsort(times)]
        chosen = rows if _is_all(new, rows.num_rows) else rows.take(pa.array(new))
        return self._table.write(
            chosen,
            value=str(bucket),
            ranges=[self._event_time, INGESTED],
            repetitive=repetitive_columns(chosen.schema, self._event_id),
        )

    def _known(self, table: DeltaTable, paths: Sequence[str], ids: pa.Table) -> NDArray[np.bool_]:
        """Which ids some of the table's files hold already.

        Args:
            table: Whose files they are.
            paths: The files.
            ids: The id column and its hashes, ``n`` rows.

        Returns:
            Shape ``(n,)``.
        """
        hashes = ids.column(ID_HASH).to_numpy()
        known = np.zeros(len(hashes), dtype=np.bool_)
        hit: list[str] = []
        for path in paths:
            found = _is_in(hashes, self._file_hashes(table, path))
            if found.any():
                hit.append(path)
                known |= found
        if not hit or pa.types.is_integer(ids.schema.field(self._event_id).type):
            return known  # the hash of an integer is one to one
        same = pa.array(hashes[known])
        candidates = self._table.read(table, hit, columns=[self._event_id], where=pc.field(ID_HASH).isin(same))
        stored = pc.is_in(ids.column(self._event_id), value_set=candidates.column(self._event_id).combine_chunks())
        known &= stored.to_numpy()
        return known

    def _file_hashes(self, table: DeltaTable, path: str) -> IntArray:
        name = f"{self._table.uri}/{path}"
        kept = self._hashes.get(name)
        if kept is None:
            kept = np.sort(self._table.read(table, [path], columns=[ID_HASH]).column(ID_HASH).to_numpy())
            self._hashes.put(name, kept)
        return kept


def repetitive_columns(schema: pa.Schema, event_id: str) -> list[str]:
    """The columns that a dictionary makes small: ingestion times, and texts that aren't ids."""
    return [INGESTED, *repetitive_texts(schema, event_id)]


def repetitive_texts(schema: pa.Schema, event_id: str) -> list[str]:
    """The columns of text that are stored as dictionaries."""
    return [field.name for field in schema if pa.types.is_string(field.type) and field.name != event_id]


def first_of_each(rows: pa.Table, event_id: str) -> IntArray:
    """The first row of each event id.

    Args:
        rows: The id column and its hashes, ``n`` rows.
        event_id: The id column's name.

    Returns:
        Row numbers, ascending.
    """
    hashes = rows.column(ID_HASH).to_numpy()
    ordered = np.sort(hashes)
    if not (ordered[1:] == ordered[:-1]).any():  # nearly always, and far quicker to see than where each first is
        return np.arange(len(hashes))
    _, first = np.unique(hashes, return_index=True)
    if not pa.types.is_integer(rows.schema.field(event_id).type):
        codes = rows.column(event_id).combine_chunks().dictionary_encode().indices.to_numpy()
        _, first = np.unique(codes, return_index=True)
    return np.sort(first)


def _is_in(values: IntArray, among: IntArray) -> NDArray[np.bool_]:
    """Whether each value is among sorted ones."""
    if len(among) == 0:
        return np.zeros(len(values), dtype=np.bool_)
    at = np.minimum(np.searchsorted(among, values), len(among) - 1)
    found: NDArray[np.bool_] = among[at] == values
    return found


def _is_all(rows: IntArray, n: int) -> bool:
    return len(rows) == n and bool((rows == np.arange(n)).all())


def _in_threads(work: Callable[[int], None], buckets: Sequence[int]) -> None:
    if len(buckets) < 2:
        for bucket in buckets:
            work(bucket)
        return
    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(work, buckets):
            pass
