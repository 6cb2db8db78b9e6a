"""What is computed and kept by day: feature snapshots, predictions, actuals, batch results, dead letters.

    features/{view}@{version}    a day's rows replace that day's
    predictions/{model}          one row a prediction, from the stream, exactly once
    actuals/{model}              labels that were reported, from the stream, exactly once
    batch/{model}                one batch prediction's rows replace those of the same instant
    dead_letters/{source}        rejected rows with their reasons, each once

All are Delta tables below the storage root, partitioned by ``_day`` or the instant, so that
writing the same thing again changes nothing that a reader could see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.transaction import AddAction

from heliostat.clock import US_PER_DAY, format_instant
from heliostat.errors import UnknownTableError
from heliostat.schema import TIMESTAMP, times_us
from heliostat.storage.delta import Commit, OpenTables, Progress, StreamId, Table, arrow_schema
from heliostat.storage.event_files import paths_of, pruned
from heliostat.storage.places import absolute_root, joined, subfolders

Kind = Literal["features", "predictions", "actuals", "batch", "dead_letters"]
StreamKind = Literal["predictions", "actuals"]

DAY = "_day"
AS_OF = "_as_of_us"
_DIGEST = "_digest"

PREDICTIONS = pa.schema(
    [
        ("prediction_id", pa.string()),
        ("request_id", pa.string()),
        ("model", pa.string()),
        ("revision", pa.int64()),
        ("at", TIMESTAMP),
        ("entity", pa.string()),
        ("variant", pa.string()),
        ("version", pa.int64()),
        ("score", pa.float64()),
        ("features", pa.list_(pa.float64())),
        ("missing", pa.list_(pa.string())),
        ("source", pa.string()),
        ("fallback", pa.string()),
        ("given", pa.list_(pa.string())),
        ("inputs", pa.string()),
        ("trace_id", pa.string()),
        ("newest_event", TIMESTAMP),
        ("latency_ms", pa.float64()),
        ("forced", pa.bool_()),
    ]
)
"""One row a prediction; ``features`` in the order of the version's signature, null where missing.

``fallback`` is the rung of the ladder that answered, null for the model itself; ``given`` names the
features whose values the request brought along; ``inputs`` is a JSON object of what it brought for
derived features, null if the model takes nothing. ``newest_event`` is where the newest tile begins that the
features were read from (the newest event is at most a tile younger), null if there was none; ``latency_ms``
is the time from the request's arrival to the making of this row; ``forced`` says that the request asked for
its variant. Rows of an earlier release have null in what it didn't write down.
"""

ACTUALS = pa.schema(
    [
        ("model", pa.string()),
        ("prediction_id", pa.string()),
        ("entity", pa.string()),
        ("as_of", TIMESTAMP),
        ("value", pa.float64()),
        ("at", TIMESTAMP),
    ]
)
"""One row a reported label, by prediction id or by (entity, as_of); ``at`` is when it was reported."""

DEAD_LETTERS = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("event", pa.string()),
        ("rejected_at", TIMESTAMP),
    ]
)
"""One row a rejected row: where it was read, counted from 0, and what it held, as JSON."""

_STREAMED: Mapping[StreamKind, pa.Schema] = {"predictions": PREDICTIONS, "actuals": ACTUALS}
_SMALL_FILE_ROWS = 100_000


class OfflineStore:
    """Cheap and picklable; nothing is opened before its first use.

    Args:
        root: Folder, or a URL such as ``s3://…``.
        storage_options: Options of the object store.
    """

    def __init__(self, root: str, storage_options: Mapping[str, str] | None = None) -> None:
        self.root = absolute_root(root)
        self.storage_options = dict(storage_options or {})
        self._kept: OpenTables | None = None

    def __repr__(self) -> str:
        return f"OfflineStore({self.root!r})"

    def keeping(self, tables: OpenTables) -> OfflineStore:
        """The same store, whose tables stay open: for one thread, that reads or appends again and again."""
        store = OfflineStore(self.root, self.storage_options)
        store._kept = tables
        return store

    # ── Feature snapshots ────────────────────────────────────────────────────────

    def write_day(self, view_ref: str, day_us: int, rows: pa.Table) -> int:
        """Make rows the snapshot of a view at a day: they replace what that day held, in one commit.

        Args:
            view_ref: ``name@version``.
            day_us: Any instant of the day, microseconds.
            rows: Key columns, ``as_of`` and features, one row an entity.

        Returns:
            The table's version that holds them.
        """
        table = self._table("features", view_ref, DAY)
        table.ensure(rows.schema.append(pa.field(DAY, pa.string())))
        day = day_text(day_us)
        adds = [table.write(rows, value=day, repetitive=_texts(rows.schema))] if rows.num_rows else []
        return self._swap(table, day, adds)

    def read(self, view_ref: str, *, start_us: int, end_us: int, entities: pa.Table | None = None) -> pa.Table:
        """Read snapshots of a view.

        Args:
            view_ref: ``name@version``.
            start_us: The first day is the one with this instant.
            end_us: Days that begin before this instant.
            entities: Key columns of those wanted; None: all.

        Raises:
            UnknownTableError: If the view has no snapshot.
        """
        rows = self._read(self._table("features", view_ref, DAY), "features", view_ref, start_us, end_us)
        if entities is None:
            return rows
        return rows.join(entities, keys=entities.column_names, join_type="left semi")

    def days(self, view_ref: str) -> list[str]:
        """The days that have a snapshot, ``YYYY-MM-DD``, ascending."""
        return self._values(self._table("features", view_ref, DAY))

    # ── Predictions and actuals, from streams ────────────────────────────────────

    def append_stream(self, kind: StreamKind, model: str, rows: pa.Table, progress: Progress) -> int:
        """Append rows that came through a stream, together with how far it is applied.

        Args:
            kind: ``predictions`` or ``actuals``.
            model: Whose they are.
            rows: Columns of `PREDICTIONS` or `ACTUALS`.
            progress: Of the stream, for this model's table.

        Returns:
            The table's version that holds them.

        Raises:
            StaleProgressError: If somebody else has applied entries of the stream meanwhile.
        """
        table = self._table(kind, model, DAY)
        schema = _STREAMED[kind]
        table.ensure(schema.append(pa.field(DAY, pa.string())))
        adds = [
            table.write(part, value=day, ranges=["at"], repetitive=_texts(schema))
            for day, part in _by_day(rows, "at")
        ]
        return table.commit(schema.append(pa.field(DAY, pa.string())), lambda _: Commit(adds=adds, progress=progress))

    def progress(self, kind: StreamKind, model: str, streams: Sequence[str]) -> dict[str, StreamId | None]:
        """The last entry of each stream that is in a model's table; None where nothing is."""
        table = self._table(kind, model, DAY)
        return table.progress(table.open(), streams)

    def read_stream(
        self, kind: StreamKind, model: str, *, start_us: int, end_us: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Read predictions or actuals of a model; none yet reads as empty.

        Args:
            kind: ``predictions`` or ``actuals``.
            model: Whose.
            start_us: Only those at or after this instant.
            end_us: Only those before this instant.
            columns: Which; None: all.
        """
        table, schema = self._table(kind, model, DAY), _STREAMED[kind]
        wanted = pa.schema([schema.field(name) for name in (schema.names if columns is None else columns)])
        current = table.open()
        if current is None:
            return wanted.empty_table()
        at = pc.field("at")
        where = (at >= pa.scalar(start_us, TIMESTAMP)) & (at < pa.scalar(end_us, TIMESTAMP))
        stored = set(arrow_schema(current).names)
        # A table of an earlier release gains its new columns with the next append.
        held = [name for name in dict.fromkeys(("at", *wanted.names)) if name in stored]
        # Parts of a day are told apart by the files' statistics: a day of a busy model has many files.
        near = pruned(table.files(current), None, "at", start_us, end_us)
        found = table.read(current, paths_of(near), columns=held, where=where)
        return _filled(found, wanted)

    def read_predictions(
        self, model: str, *, start_us: int, end_us: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Read the predictions of a model, columns of `PREDICTIONS`; as `read_stream`."""
        return self.read_stream("predictions", model, start_us=start_us, end_us=end_us, columns=columns)

    def read_actuals(
        self, model: str, *, start_us: int, end_us: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Read the reported labels of a model, columns of `ACTUALS`; as `read_stream`."""
        return self.read_stream("actuals", model, start_us=start_us, end_us=end_us, columns=columns)

    def find_prediction(self, prediction_id: str, model: str) -> pa.Table:
        """The row of one prediction, columns of `PREDICTIONS`; without it, or any, no rows.

        Args:
            prediction_id: As the answer named it.
            model: Whose.
        """
        table = self._table("predictions", model, DAY)
        current = table.open()
        if current is None:
            return PREDICTIONS.empty_table()
        stored = set(arrow_schema(current).names)
        held = [name for name in PREDICTIONS.names if name in stored]
        paths = paths_of(table.files(current))
        return _filled(
            table.read(current, paths, columns=held, where=pc.field("prediction_id") == prediction_id), PREDICTIONS
        )

    def compact(self, kind: StreamKind, model: str, *, min_files: int = 32) -> int:
        """Merge the small files that many little appends leave; returns how many were merged."""
        return self._table(kind, model, DAY).compact(
            min_files=min_files,
            max_rows=_SMALL_FILE_ROWS,
            sort_by="at",
            ranges=["at"],
            repetitive=_texts(_STREAMED[kind]),
        )

    # ── Batch predictions ────────────────────────────────────────────────────────

    def write_batch(self, model: str, as_of_us: int, rows: pa.Table) -> int:
        """Make rows the batch prediction of a model at an instant: they replace that instant's.

        Args:
            model: Whose.
            as_of_us: The instant that the features are of.
            rows: Key columns, score and what else belongs to it.

        Returns:
            The table's version that holds them.
        """
        parts = [self.write_batch_part(model, as_of_us, rows)] if rows.num_rows else []
        return self.commit_batch(model, as_of_us, parts)

    def write_batch_part(self, model: str, as_of_us: int, rows: pa.Table) -> AddAction:
        """Write a part of a batch prediction that nobody sees before `commit_batch`; for parallel tasks."""
        table = self._table("batch", model, AS_OF)
        table.ensure(rows.schema.append(pa.field(AS_OF, pa.int64())))
        return table.write(rows, value=str(as_of_us), repetitive=_texts(rows.schema))

    def commit_batch(self, model: str, as_of_us: int, parts: Sequence[AddAction]) -> int:
        """Make parts the batch prediction of an instant, in one commit; returns the table's version."""
        return self._swap(self._table("batch", model, AS_OF), str(as_of_us), parts)

    def read_batch(self, model: str, as_of_us: int | None = None) -> pa.Table:
        """Read a batch prediction; without an instant, the latest.

        Raises:
            UnknownTableError: If there is none.
        """
        instants = self.batches(model)
        wanted = as_of_us if as_of_us is not None else instants[-1] if instants else None
        if wanted is None or wanted not in instants:
            at = "any instant" if wanted is None else format_instant(wanted)
            raise UnknownTableError(f"batch/{model} at {at}", tuple(map(format_instant, instants)))
        return self._rows_of(self._table("batch", model, AS_OF), lambda value: value == str(wanted))

    def batches(self, model: str) -> list[int]:
        """The instants that have a batch prediction, microseconds, ascending."""
        return sorted(int(each) for each in self._values(self._table("batch", model, AS_OF)))

    # ── Dead letters ─────────────────────────────────────────────────────────────

    def append_dead_letters(self, source: str, rows: pa.Table) -> int:
        """Keep rejected rows; the same row of the same file, rejected for the same reason, once.

        Args:
            source: The event source's name.
            rows: Columns of `DEAD_LETTERS`.

        Returns:
            How many are new.
        """
        if rows.num_rows == 0:
            return 0
        table, schema = self._table("dead_letters", source, None), DEAD_LETTERS.append(pa.field(_DIGEST, pa.string()))
        parts = [
            rows.column("file"),
            rows.column("row").cast(pa.string()),
            rows.column("reason"),
            rows.column("event"),
        ]
        rows = rows.cast(DEAD_LETTERS).append_column(_DIGEST, pc.binary_join_element_wise(*parts, "\x1f"))
        table.ensure(schema)
        written: list[AddAction] = []
        new = 0

        def prepare(current: DeltaTable) -> Commit | None:
            nonlocal new
            table.discard(written)
            written.clear()
            known = table.read(current, table.files(current).column("path").to_pylist(), columns=[_DIGEST])
            fresh = rows.filter(
                pc.invert(pc.is_in(rows.column(_DIGEST), value_set=known.column(_DIGEST).combine_chunks()))
            )
            new = fresh.num_rows
            if new == 0:
                return None
            written.append(table.write(fresh, ranges=["rejected_at"], repetitive=["file", "reason"]))
            return Commit(adds=written)

        table.commit(schema, prepare)
        return new

    def read_dead_letters(self, source: str) -> pa.Table:
        """The rejected rows of a source, columns of `DEAD_LETTERS`; none yet reads as empty."""
        table = self._table("dead_letters", source, None)
        current = table.open()
        if current is None:
            return DEAD_LETTERS.empty_table()
        paths = sorted(table.files(current).column("path").to_pylist())
        return table.read(current, paths, columns=DEAD_LETTERS.names)

    # ── All tables ───────────────────────────────────────────────────────────────

    def tables(self, kind: Kind) -> list[str]:
        """The names that have a table of a kind: view references, models or sources."""
        names = subfolders(self.root, self.storage_options, kind)
        return [name for name in names if self._table(kind, name, None).open() is not None]

    def version(self, kind: Kind, name: str) -> int:
        """The current version of a table; -1 when there is none yet."""
        table = self._table(kind, name, None).open()
        return -1 if table is None else table.version()

    def table(self, kind: Kind, name: str) -> Table:
        """The Delta table of a kind and name; it may not exist."""
        return self._table(kind, name, {"batch": AS_OF, "dead_letters": None}.get(kind, DAY))

    def _table(self, kind: Kind, name: str, partition: str | None) -> Table:
        return Table(joined(self.root, kind, name), self.storage_options, partition, self._kept)

    def _swap(self, table: Table, value: str, adds: Sequence[AddAction]) -> int:
        """Put files in the place of all that a partition holds now."""
        ours = {add.path for add in adds}

        def prepare(current: DeltaTable) -> Commit | None:
            held = [each for each in table.files(current).to_pylist() if _value(each, table) == value]
            present = {each["path"] for each in held}
            stamp_ms = max((int(each["modification_time"]) for each in held), default=0)
            stamp_ms = max((add.modification_time for add in adds), default=stamp_ms)
            removes = [table.removal(each, deleted_ms=stamp_ms) for each in held if each["path"] not in ours]
            new = [add for add in adds if add.path not in present]
            return Commit(adds=new, removes=removes) if new or removes else None

        current = table.open()
        return -1 if current is None else table.commit(arrow_schema(current), prepare)

    def _values(self, table: Table) -> list[str]:
        current = table.open()
        if current is None:
            return []
        return sorted({_value(each, table) for each in table.files(current).to_pylist()})

    def _read(self, table: Table, kind: str, name: str, start_us: int, end_us: int) -> pa.Table:
        if table.open() is None:
            raise UnknownTableError(f"{kind}/{name}", tuple(self.tables(kind)))  # type: ignore[arg-type]
        first, last = day_text(start_us), day_text(end_us - 1)
        return self._rows_of(table, lambda day: first <= day <= last)

    def _rows_of(self, table: Table, wanted: Callable[[str], bool]) -> pa.Table:
        current = table.current()
        names = [each for each in arrow_schema(current).names if each != table.partition]
        paths = sorted((_value(each, table), each["path"]) for each in table.files(current).to_pylist())
        return table.read(current, [path for value, path in paths if wanted(value)], columns=names)


def day_text(instant_us: int) -> str:
    """The UTC day of an instant: ``1998-07-01``."""
    return format_instant(instant_us // US_PER_DAY * US_PER_DAY)[:10]


def _value(file: Mapping[str, Any], table: Table) -> str:
    return str(file[f"partition.{table.partition}"])


def _by_day(rows: pa.Table, column: str) -> list[tuple[str, pa.Table]]:
    days = times_us(rows.column(column)) // US_PER_DAY
    return [(day_text(day * US_PER_DAY), rows.filter(pa.array(days == day))) for day in np.unique(days).tolist()]


def _filled(rows: pa.Table, wanted: pa.Schema) -> pa.Table:
    """The wanted columns; those that an earlier release didn't write are null."""
    columns = [
        rows.column(each.name) if each.name in rows.column_names else pa.nulls(rows.num_rows, each.type)
        for each in wanted
    ]
    return pa.table(columns, names=wanted.names)


def _texts(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if pa.types.is_string(field.type) and not field.name.endswith("_id")]
