"""One Delta table: files are written first and become visible in one commit, or never.

Commits are compare-and-swap: each is prepared against one version and succeeds only as the
next one, otherwise it is prepared again against what others have committed meanwhile. So
what a preparation has checked (these ids are new, this stream was applied up to here) still
holds at the instant it takes effect, whoever else writes, on a disk or in an object store.
"""

from __future__ import annotations

import contextlib
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from deltalake import CommitProperties, DeltaTable, Field, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler
from deltalake.transaction import AddAction, RemoveAction

from heliostat.errors import SchemaMismatchError, StaleProgressError, TableCommitError
from heliostat.schema import describe_schema
from heliostat.storage.parquet import as_dictionaries, read_files, statistics, write_file
from heliostat.storage.places import one_line, reached

StreamId = tuple[int, int]
"""A stream entry's id: milliseconds and sequence number; compares like the ids do."""

_MAX_ATTEMPTS = 100


@dataclass(frozen=True)
class Progress:
    """How far streams are applied to a table, moved on by the commit that applies them.

    Attributes:
        before: The last entry applied so far by stream; None where nothing was.
        after: The last entry that this commit applies.
    """

    before: Mapping[str, StreamId | None]
    after: Mapping[str, StreamId]


@dataclass(frozen=True)
class Commit:
    """What one commit does.

    Attributes:
        adds: Files that become part of the table; they are written already.
        removes: Files of the table that cease to be.
        progress: Streams applied by it.
    """

    adds: Sequence[AddAction] = ()
    removes: Sequence[RemoveAction] = ()
    progress: Progress | None = None


class OpenTables:
    """Tables that somebody uses again and again: opened once, and then only told what was committed since.

    To open a table is to read what was committed since its last checkpoint: up to a hundred files.

    For one thread: a table moves on when it is opened again, also for whoever has opened it before.
    """

    def __init__(self) -> None:
        # By place: the table, and the commit that it was at when it was looked at last.
        self._held: dict[str, tuple[DeltaTable, int, pafs.FileInfo]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenTables, ()

    def current(self, place: Table) -> DeltaTable:
        """A table as it is now.

        Raises:
            TableNotFoundError: If there is none.
        """
        held = self._held.pop(place.uri, None)  # what fails below is opened anew next time
        if held is not None and not _is_same(held[2], place.commit_file(held[1])):
            held = None  # deleted since, and perhaps created again
        if held is not None:
            held[0].update_incremental()
        table = place.load() if held is None else held[0]
        version = table.version()
        if held is None or version != held[1]:
            held = table, version, place.commit_file(version)
        self._held[place.uri] = held
        return table

    def forget(self, uri: str | None = None) -> None:
        """Open a table anew next time; None: all of them."""
        if uri is None:
            self._held.clear()
        else:
            self._held.pop(uri, None)


@dataclass
class Table:
    """A Delta table with one partition column, or none.

    Args:
        uri: Absolute path, or a URL such as ``s3://…``.
        options: Options of the object store.
        partition: The partition column.
        kept: Where it stays open; None: it is opened anew each time.
    """

    uri: str
    options: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold secrets
    partition: str | None = None
    kept: OpenTables | None = field(default=None, repr=False, compare=False)

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine."""
        return "://" not in self.uri

    def open(self, version: int | None = None) -> DeltaTable | None:
        """The table as it is now, or was at a version; None if there is none."""
        if self.is_local and not Path(self.uri, "_delta_log").is_dir():
            return None
        with reached(self.uri):
            try:
                return self._current() if version is None else self.load(version)
            except TableNotFoundError:
                return None

    def load(self, version: int | None = None) -> DeltaTable:
        """Open the table anew, as it is now or was at a version."""
        return DeltaTable(self.uri, version=version, storage_options=dict(self.options))

    def _current(self) -> DeltaTable:
        return self.load() if self.kept is None else self.kept.current(self)

    def has_commit(self, version: int) -> bool:
        """Whether a version was committed, and its commit not yet cleaned up: after 30 days, by Delta's own rule."""
        with reached(self.uri):
            return bool(self.commit_file(version).is_file)

    def commit_file(self, version: int) -> pafs.FileInfo:
        """What is known of the file that committed a version."""
        return self.filesystem().get_file_info(f"_delta_log/{version:020d}.json")

    def ensure(self, schema: pa.Schema, configuration: Mapping[str, str] | None = None) -> DeltaTable:
        """Open the table; create it when absent, and add columns that the schema has gained.

        Args:
            schema: All columns, the partition's included.
            configuration: Kept with the table from its creation on.

        Raises:
            SchemaMismatchError: If a column exists with another type.
        """
        table = self.open()
        if table is None:
            try:
                DeltaTable.create(
                    self.uri,
                    schema,
                    mode="ignore",
                    partition_by=[] if self.partition is None else [self.partition],
                    configuration=dict(configuration or {}),
                    storage_options=dict(self.options),
                    raise_if_key_not_exists=False,
                )
            except (DeltaError, OSError) as error:
                # Somebody may have been quicker.
                if self.open() is None:
                    raise TableCommitError(self.uri, one_line(error)) from error
            table = self.current()
        return self._evolved(table, schema)

    def _evolved(self, table: DeltaTable, schema: pa.Schema) -> DeltaTable:
        found = arrow_schema(table)
        changed = [
            f"column {each.name!r} is {each.type}, stored as {found.field(each.name).type}"
            for each in schema
            if each.name in found.names and found.field(each.name).type != each.type
        ]
        if changed:
            raise SchemaMismatchError(f"a new row for {self.uri}", tuple(changed), describe_schema(found))
        new = [each for each in schema if each.name not in found.names]
        if not new:
            return table
        try:
            table.alter.add_columns([Field.from_arrow(each.with_nullable(True)) for each in new])
        except DeltaError as error:
            # Somebody else may have added them at the same time.
            if not set(schema.names) <= set(arrow_schema(self.current()).names):
                raise TableCommitError(self.uri, one_line(error)) from error
        return self.current()

    def current(self) -> DeltaTable:
        """The table as it is now.

        Raises:
            TableUnavailableError: If there is none, or it can't be reached.
        """
        with reached(self.uri):
            return self._current()

    def filesystem(self) -> pafs.FileSystem:
        """Where the table's files are, by their paths relative to it."""
        if self.is_local:
            return pafs.SubTreeFileSystem(self.uri, pafs.LocalFileSystem())
        return pafs.PyFileSystem(DeltaStorageHandler(self.uri, dict(self.options)))

    def write(
        self, rows: pa.Table, *, value: str | None = None, ranges: Sequence[str] = (), repetitive: Sequence[str] = ()
    ) -> AddAction:
        """Write one file, which nobody sees until it is committed.

        Args:
            rows: Without the partition column; at least one row.
            value: The partition's value.
            ranges: Timestamp and integer columns whose smallest and largest value are kept for pruning.
            repetitive: Columns of few distinct values, which a dictionary makes small.
        """
        folder = "" if self.partition is None else f"{self.partition}={value}/"
        path = f"{folder}part-{uuid.uuid4()}.parquet"
        filesystem = self.filesystem()
        try:
            if folder and self.is_local:
                filesystem.create_dir(folder, recursive=True)
            with filesystem.open_output_stream(path) as sink:
                write_file(rows, sink, repetitive=repetitive)
            written = filesystem.get_file_info(path)
        except (DeltaError, OSError) as error:
            raise TableCommitError(self.uri, one_line(error)) from error
        modified_ns = written.mtime_ns
        return AddAction(
            path=path,
            size=int(written.size),
            partition_values={} if self.partition is None else {self.partition: value},
            modification_time=0 if modified_ns is None else modified_ns // 1_000_000,
            data_change=True,
            stats=orjson.dumps(statistics(rows, ranges)).decode(),
        )

    def discard(self, adds: Sequence[AddAction]) -> None:
        """Delete files that won't be committed."""
        filesystem = self.filesystem()
        for add in adds:
            with contextlib.suppress(FileNotFoundError):
                filesystem.delete_file(add.path)

    def files(self, table: DeltaTable) -> pa.Table:
        """The table's files: ``path``, ``size_bytes``, ``num_records``, ``partition.…``, ``min.…``, ``max.…``."""
        return pa.table(table.get_add_actions(flatten=True))

    def read(
        self,
        table: DeltaTable | pa.Schema,
        paths: Sequence[str],
        *,
        columns: Sequence[str],
        where: pc.Expression | None = None,
        near: pc.Expression | None = None,
        dictionaries: Sequence[str] = (),
    ) -> pa.Table:
        """Read columns of some of the table's files, in the order of the paths.

        Args:
            table: Says which columns there are, as does its `arrow_schema`; those that a file lacks read as null.
            paths: Relative to the table.
            columns: Not the partition column.
            where: Only rows that meet it.
            near: Only row groups that may hold a row that meets it; it costs nothing a row.
            dictionaries: Columns of text that come as dictionaries, the way they are stored.
        """
        schema = table if isinstance(table, pa.Schema) else arrow_schema(table)
        stored = as_dictionaries(schema, dictionaries)
        if not paths:
            return pa.schema([stored.field(name) for name in columns]).empty_table()
        with reached(self.uri):
            return read_files(
                paths, self.filesystem(), stored, columns=columns, where=where, near=near, dictionaries=dictionaries
            )

    def removal(self, file: Mapping[str, Any], *, deleted_ms: int, changes_data: bool = True) -> RemoveAction:
        """The action that takes a file out of the table.

        Args:
            file: A row of `files`.
            deleted_ms: When, milliseconds since the epoch, by the clock that stamps files.
            changes_data: False if its rows go on in another file.
        """
        values = {} if self.partition is None else {self.partition: _spelled(file[f"partition.{self.partition}"])}
        return RemoveAction(file["path"], changes_data, deleted_ms, int(file["size_bytes"]), values)

    def compact(
        self, *, min_files: int, max_rows: int, sort_by: str, ranges: Sequence[str], repetitive: Sequence[str] = ()
    ) -> int:
        """Merge small files of the same partition; readers see the same rows before and after.

        Args:
            min_files: Partitions with fewer small files are left alone.
            max_rows: What counts as small.
            sort_by: The order of rows in the merged file.
            ranges: As in `write`.
            repetitive: As in `write`.

        Returns:
            How many files were merged.
        """
        table = self.open()
        if table is None:
            return 0
        schema = arrow_schema(table)
        columns = [name for name in schema.names if name != self.partition]
        merged: dict[str | None, tuple[AddAction, list[dict[str, Any]]]] = {}

        def prepare(current: DeltaTable) -> Commit | None:
            files = [each for each in self.files(current).to_pylist() if each["num_records"] <= max_rows]
            present = {each["path"] for each in files}
            for value in [
                value for value, (_, old) in merged.items() if not {each["path"] for each in old} <= present
            ]:
                self.discard([merged.pop(value)[0]])  # somebody else has merged them
            by_value: dict[str | None, list[dict[str, Any]]] = {}
            for each in files:
                by_value.setdefault(_spelled(each.get(f"partition.{self.partition}")), []).append(each)
            for value, old in by_value.items():
                if len(old) >= min_files and value not in merged:
                    rows = self.read(current, [each["path"] for each in old], columns=columns).sort_by(sort_by)
                    merged[value] = self.write(rows, value=value, ranges=ranges, repetitive=repetitive), old
            if not merged:
                return None
            return Commit(
                adds=[replace(add, data_change=False) for add, _ in merged.values()],
                removes=[
                    self.removal(each, deleted_ms=add.modification_time, changes_data=False)
                    for add, old in merged.values()
                    for each in old
                ],
            )

        self.commit(schema, prepare)
        return sum(len(old) for _, old in merged.values())

    def commit(self, schema: pa.Schema, prepare: Callable[[DeltaTable], Commit | None]) -> int:
        """Commit what a preparation finds right, as the version after the one it looked at.

        Args:
            schema: All columns.
            prepare: Called with the current table, again after each commit of somebody else;
                None means that nothing is left to do.

        Returns:
            The version that holds it.

        Raises:
            StaleProgressError: If a stream's progress isn't what the preparation took it for.
            TableCommitError: If the commit fails though nobody else has committed.
        """
        failed: tuple[int, str, Commit] | None = None
        for attempt in range(_MAX_ATTEMPTS):
            table = self.current()
            base = table.version()
            if failed is not None and failed[0] == base:
                raise TableCommitError(self.uri, failed[1])
            if failed is not None and self._holds(table, failed[2].adds):
                return base  # it did succeed; only the answer was lost
            commit = prepare(table)
            if commit is None:
                return base
            try:
                table.create_write_transaction(
                    [*commit.adds, *commit.removes],
                    "append",
                    schema,
                    [] if self.partition is None else [self.partition],
                    commit_properties=CommitProperties(
                        max_commit_retries=0, app_transactions=self._transactions(table, commit.progress)
                    ),
                )
            except CommitFailedError as error:
                failed = base, one_line(error), commit
                self._forget()
                time.sleep(random.uniform(0, 0.002 * min(attempt + 1, 25)))  # noqa: S311 - spreads out writers
            except (DeltaError, OSError) as error:
                self._forget()
                raise TableCommitError(self.uri, one_line(error)) from error
            else:
                return base + 1
        raise TableCommitError(self.uri, f"{_MAX_ATTEMPTS} other commits came first")

    def _forget(self) -> None:
        if self.kept is not None:
            self.kept.forget(self.uri)

    def _holds(self, table: DeltaTable, adds: Sequence[AddAction]) -> bool:
        return bool(adds) and {each.path for each in adds} <= set(self.files(table).column("path").to_pylist())

    def progress(self, table: DeltaTable | None, streams: Sequence[str]) -> dict[str, StreamId | None]:
        """The last entry of each stream that is applied to the table; None where nothing is."""
        with reached(self.uri):
            return {stream: None if table is None else _applied(table, stream) for stream in streams}

    def _transactions(self, table: DeltaTable, progress: Progress | None) -> list[Transaction] | None:
        if progress is None:
            return None
        for stream, before in progress.before.items():
            applied = _applied(table, stream)
            if applied != before:
                raise StaleProgressError(stream, _id_text(before), _id_text(applied))
        # Two numbers, since one of 64 bits couldn't hold every id.
        return [
            Transaction(f"{stream}#{part}", number)
            for stream, last in progress.after.items()
            for part, number in zip(("ms", "seq"), last, strict=True)
        ]


def _is_same(before: pafs.FileInfo, now: pafs.FileInfo) -> bool:
    return bool(now.is_file) and (before.mtime_ns, before.size) == (now.mtime_ns, now.size)


def arrow_schema(table: DeltaTable) -> pa.Schema:
    """A table's schema in Arrow's words."""
    return pa.schema(table.schema().to_arrow())


def _applied(table: DeltaTable, stream: str) -> StreamId | None:
    ms, seq = (table.transaction_version(f"{stream}#{part}") for part in ("ms", "seq"))
    return None if ms is None or seq is None else (ms, seq)


def _id_text(entry: StreamId | None) -> str:
    return "nothing" if entry is None else f"{entry[0]}-{entry[1]}"


def _spelled(value: Any) -> str | None:  # noqa: ANN401 - partition values are texts, integers or dates
    return None if value is None else str(value)
