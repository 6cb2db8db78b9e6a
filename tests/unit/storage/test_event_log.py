"""The event log: bucketed, each id once, all or nothing, whoever else appends."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.errors import (
    BucketCountError,
    KeyColumnError,
    SchemaMismatchError,
    StaleProgressError,
    UnknownColumnError,
)
from heliostat.features.definitions import Entity, EventSource
from heliostat.schema import ID_HASH, INGESTED, TIE, TIMESTAMP, hash64, tie48
from heliostat.storage.delta import Progress, Table
from heliostat.storage.event_append import EntityAppend, Spool
from heliostat.storage.event_log import EventLog

USER = Entity("user", keys={"user_id": "int64"})
SHOP = Entity("shop", keys={"shop": "string"})


def make_source(
    *, id_type: pa.DataType | None = None, entity: Any = USER, extra: tuple[Any, ...] = ()
) -> EventSource:
    columns = [
        ("user_id", pa.int64()),
        ("shop", pa.string()),
        ("event_id", id_type or pa.string()),
        ("at", TIMESTAMP),
        ("amount", pa.float64()),
        *extra,
    ]
    return EventSource("sales", schema=pa.schema(columns), entity=entity, event_time="at", event_id="event_id")


SALES = make_source()


def events(*rows: tuple[int, str, int], amount: float = 1.0) -> pa.Table:
    """Rows of (user, event id, event time)."""
    return pa.table(
        {
            "user_id": pa.array([row[0] for row in rows], pa.int64()),
            "shop": pa.array([f"shop{row[0] % 2}" for row in rows], pa.string()),
            "event_id": pa.array([row[1] for row in rows], pa.string()),
            "at": pa.array([row[2] for row in rows], TIMESTAMP),
            "amount": pa.array([amount for _ in rows], pa.float64()),
        }
    )


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(str(tmp_path), n_buckets=4)


def test_log_that_does_not_exist_reads_as_empty(log: EventLog) -> None:
    assert log.version(SALES, USER) == -1
    assert log.statistics(SALES, USER).rows == 0
    found = log.read_bucket(SALES, USER, 0, columns=["user_id", "at", TIE])
    assert found.num_rows == 0
    assert found.schema.types == [pa.int64(), TIMESTAMP, pa.int64()]


def test_what_is_appended_is_read_back_from_its_bucket(log: EventLog) -> None:
    given_rows = events(*[(user, f"e{user}", user * 10) for user in range(40)])
    result = log.append(SALES, given_rows, ingested_us=77)
    assert (result.accepted, result.duplicates) == (40, 0)
    assert log.version(SALES, USER) == result.versions["user"]
    seen = 0
    for bucket in log.buckets:
        found = log.read_bucket(SALES, USER, bucket)
        keys = USER.encode(found)
        assert set(USER.buckets(keys, 4).tolist()) <= {bucket}
        assert set(found.column(INGESTED).to_pylist()) <= {77}
        hashes = hash64(found.column("event_id"))
        assert found.column(ID_HASH).to_pylist() == hashes.view(np.int64).tolist()
        assert found.column(TIE).to_pylist() == tie48(hashes).tolist()
        seen += found.num_rows
    assert seen == 40
    whole = log.read(SALES, USER, columns=given_rows.column_names).sort_by("user_id")
    assert whole.equals(given_rows)


def test_one_append_is_one_commit_however_many_buckets_it_fills(log: EventLog) -> None:
    before = log.append(SALES, events((1, "a", 1)), ingested_us=0).versions["user"]
    with log.bulk(SALES, ingested_us=0) as bulk:
        for start in range(0, 100, 10):
            bulk.add(events(*[(user, f"e{user}", user) for user in range(start, start + 10)]))
        assert log.read(SALES, USER).num_rows == 1, "nothing is seen before the commit"
        after = bulk.commit().versions["user"]
    assert after == before + 1
    assert log.read(SALES, USER).num_rows == 101


def test_bulk_append_that_is_given_up_leaves_nothing(log: EventLog) -> None:
    with log.bulk(SALES, ingested_us=0) as bulk:
        bulk.add(events((1, "a", 1)))
    assert log.version(SALES, USER) == -1


@pytest.mark.parametrize("spool_bytes", [1, 256_000_000])
def test_rows_that_do_not_fit_into_memory_go_over_the_disk(
    log: EventLog, monkeypatch: pytest.MonkeyPatch, spool_bytes: int
) -> None:
    monkeypatch.setattr("heliostat.storage.event_log.Spool", lambda: Spool(spool_bytes))
    with log.bulk(SALES, ingested_us=0) as bulk:
        bulk.add(events(*[(user, f"e{user}", 5) for user in range(50)], amount=1.0))
        bulk.add(events(*[(user, f"e{user}", 6) for user in range(20)], amount=2.0))
        bulk.add(events(*[(user, f"f{user}", 7) for user in range(50)]))
        result = bulk.commit()
    assert (result.accepted, result.duplicates) == (100, 20)
    assert 2.0 not in log.read(SALES, USER).column("amount").to_pylist(), "the first of an id stays"


def test_repetition_adds_neither_rows_nor_a_version(log: EventLog) -> None:
    rows = events((1, "a", 1), (2, "b", 2), (3, "c", 3))
    version = log.append(SALES, rows, ingested_us=1).versions["user"]
    again = log.append(SALES, rows, ingested_us=2)
    assert (again.accepted, again.duplicates, again.versions["user"]) == (0, 3, version)
    assert log.read(SALES, USER).column(INGESTED).to_pylist() == [1, 1, 1]


def test_first_ingested_of_an_id_stays_whatever_its_other_columns_say(log: EventLog) -> None:
    log.append(SALES, events((1, "a", 10), amount=1.0), ingested_us=1)
    log.append(SALES, events((1, "a", 99), amount=2.0), ingested_us=2)
    found = log.read(SALES, USER)
    assert found.column("amount").to_pylist() == [1.0]
    assert found.column("at").cast(pa.int64()).to_pylist() == [10]


def test_equal_hashes_of_different_ids_are_different_events(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heliostat.storage.event_log.hash64", lambda ids: np.zeros(len(ids), dtype=np.uint64))
    assert log.append(SALES, events((1, "a", 1), (1, "b", 1), (1, "a", 2)), ingested_us=0).accepted == 2
    assert log.append(SALES, events((1, "b", 3), (1, "c", 3)), ingested_us=0).accepted == 1
    assert sorted(log.read(SALES, USER).column("event_id").to_pylist()) == ["a", "b", "c"]


APPENDS = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abcdefgh"), st.integers(0, 9)), max_size=8), max_size=4
)


@settings(max_examples=40, deadline=None)
@given(appends=APPENDS, n_buckets=st.integers(1, 3), integers=st.booleans())
def test_log_holds_the_first_event_of_each_id_and_bucket(
    tmp_path_factory: pytest.TempPathFactory,
    appends: list[list[tuple[int, str, int]]],
    n_buckets: int,
    integers: bool,
) -> None:
    source = make_source(id_type=pa.int64()) if integers else SALES
    log = EventLog(str(tmp_path_factory.mktemp("log")), n_buckets=n_buckets)
    expected: dict[tuple[int, Any], tuple[int, Any, int, int]] = {}
    for number, rows in enumerate(appends):
        table = events(*rows)
        if integers:
            codes = pa.array([ord(row[1]) for row in rows], pa.int64())
            table = table.set_column(2, "event_id", codes)
        buckets = USER.buckets(USER.encode(table), n_buckets) if rows else []
        new = 0
        for row, event_id, bucket in zip(rows, table.column("event_id").to_pylist(), buckets, strict=True):
            if (int(bucket), event_id) not in expected:
                expected[int(bucket), event_id] = (row[0], event_id, row[2], number)
                new += 1
        result = log.append(source, table, ingested_us=number)
        assert (result.accepted, result.duplicates) == (new, len(rows) - new)
    found = log.read(source, USER, columns=["user_id", "event_id", "at", INGESTED])
    found = found.set_column(2, "at", found.column("at").cast(pa.int64()))
    assert sorted(zip(*found.to_pydict().values(), strict=True)) == sorted(expected.values())


def test_each_entity_of_a_source_has_its_own_table(log: EventLog) -> None:
    source = make_source(entity=[USER, SHOP])
    result = log.append(source, events((1, "a", 1), (2, "b", 2), (3, "c", 3)), ingested_us=0)
    assert set(result.versions) == {"user", "shop"}
    for entity in (USER, SHOP):
        found = [log.read_bucket(source, entity, bucket) for bucket in log.buckets]
        placed = [set(entity.buckets(entity.encode(each), 4).tolist()) for each in found]
        assert all(each <= {bucket} for bucket, each in enumerate(placed))
        assert sorted(pa.concat_tables(found).column("event_id").to_pylist()) == ["a", "b", "c"]
    repaired = log.append(source, events((9, "z", 1)), ingested_us=0, entity=SHOP)
    assert list(repaired.versions) == ["shop"]
    assert "z" not in log.read(source, USER).column("event_id").to_pylist()


# ── Reading ──────────────────────────────────────────────────────────────────────────


@settings(max_examples=30, deadline=None)
@given(
    times=st.lists(st.integers(-5_000, 5_000), min_size=1, max_size=12),
    low=st.none() | st.integers(-6_000, 6_000),
    high=st.none() | st.integers(-6_000, 6_000),
)
def test_read_prunes_by_time_to_the_microsecond(
    tmp_path_factory: pytest.TempPathFactory, times: list[int], low: int | None, high: int | None
) -> None:
    log = EventLog(str(tmp_path_factory.mktemp("log")), n_buckets=1)
    for half in (times[::2], times[1::2]):
        log.append(SALES, events(*[(1, f"{time}-{half is times}", time) for time in half]), ingested_us=0)
    found = log.read_bucket(SALES, USER, 0, columns=["at"], min_time_us=low, max_time_us=high)
    stored = log.read_bucket(SALES, USER, 0, columns=["at"]).column("at").cast(pa.int64()).to_pylist()
    wanted = [each for each in stored if (low is None or each >= low) and (high is None or each < high)]
    assert sorted(found.column("at").cast(pa.int64()).to_pylist()) == sorted(wanted)


def test_raw_read_leaves_out_row_groups_and_no_row_in_between(log: EventLog) -> None:
    one = EventLog(log.root, n_buckets=1)
    n = 300_000  # three row groups
    one.append(SALES, events(*[(1, str(number), number) for number in range(n)]), ingested_us=7)
    one.append(SALES, events((2, "later", 10 * n)), ingested_us=9)
    columns = ["shop", "at", "event_id"]
    found = one.read_bucket(SALES, USER, 0, columns=columns, min_time_us=200_000, max_time_us=n, raw=True)
    times = found.column("at").cast(pa.int64()).to_numpy()
    assert set(range(200_000, n)) <= set(times.tolist())
    assert 131_072 <= times.min() < times.max() < 10 * n
    assert found.schema.field("shop").type == pa.dictionary(pa.int32(), pa.string())
    assert found.schema.field("event_id").type == pa.string()
    assert set(found.column("shop").cast(pa.string()).to_pylist()) == {"shop1"}
    known = one.read_bucket(SALES, USER, 0, columns=columns, known_at_us=8, raw=True)
    assert known.num_rows == n


def test_raw_read_of_a_column_that_old_files_lack_gives_nulls(log: EventLog) -> None:
    one = EventLog(log.root, n_buckets=1)
    one.append(SALES, events((1, "a", 1)), ingested_us=0)
    wider = make_source(extra=(("city", pa.string()),))
    one.append(wider, events((1, "b", 2)).append_column("city", pa.array(["Oslo"])), ingested_us=0)
    found = one.read_bucket(wider, USER, 0, columns=["event_id", "city"], raw=True).to_pylist()
    assert sorted((row["event_id"], row["city"]) for row in found) == [("a", None), ("b", "Oslo")]


def test_files_outside_the_asked_time_are_not_opened(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    one = EventLog(log.root, n_buckets=1)
    one.append(SALES, events((1, "old", 1_000_000)), ingested_us=0)
    one.append(SALES, events((1, "new", 9_000_000)), ingested_us=0)
    opened: list[int] = []
    read = Table.read

    def counting(self: Table, table: Any, paths: Any, **rest: Any) -> pa.Table:
        opened.append(len(paths))
        return read(self, table, paths, **rest)

    monkeypatch.setattr(Table, "read", counting)
    assert one.read(SALES, USER, min_time_us=5_000_000).column("event_id").to_pylist() == ["new"]
    assert opened == [1]


def test_an_opened_version_is_read_again_and_again_wherever_it_was_sent(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append(SALES, events(*((user, f"e{user}", user) for user in range(40))), ingested_us=0)
    opened = pickle.loads(pickle.dumps(log.opened(SALES, USER)))
    log.append(SALES, events((99, "later", 99)), ingested_us=0)

    def refuse(*_: object) -> None:
        raise AssertionError("the table was opened again")

    monkeypatch.setattr(Table, "open", refuse)
    by_bucket = [opened.read([bucket], columns=["event_id"]).num_rows for bucket in log.buckets]
    assert sum(by_bucket) == opened.read(None).num_rows == opened.statistics().rows == 40
    some = [bucket for bucket in log.buckets if by_bucket[bucket]][:2]
    assert opened.read(some, raw=True).num_rows == sum(by_bucket[bucket] for bucket in some)
    assert opened.statistics(some).rows_by_bucket == {bucket: by_bucket[bucket] for bucket in some}
    assert opened.read([]).num_rows == opened.statistics([]).rows == 0


def test_an_opened_version_is_current_until_something_is_committed(log: EventLog) -> None:
    nothing = log.opened(SALES, USER)
    assert nothing.is_current
    log.append(SALES, events((1, "a", 10)), ingested_us=0)
    first = log.opened(SALES, USER)
    assert (nothing.is_current, first.is_current) == (False, True)
    log.append(SALES, events((2, "b", 20)), ingested_us=0)
    assert not first.is_current
    assert log.opened(SALES, USER).is_current
    assert pickle.loads(pickle.dumps(log.opened(SALES, USER))).is_current


def test_rows_of_a_file_are_in_order_of_event_time(log: EventLog) -> None:
    one = EventLog(log.root, n_buckets=1)
    one.append(SALES, events((1, "c", 3), (2, "a", 1), (3, "b", 2)), ingested_us=0)
    assert one.read_bucket(SALES, USER, 0).column("event_id").to_pylist() == ["a", "b", "c"]


def test_read_as_known_at_leaves_out_what_came_later(log: EventLog) -> None:
    log.append(SALES, events((1, "a", 1)), ingested_us=100)
    log.append(SALES, events((1, "b", 1)), ingested_us=200)
    assert log.read(SALES, USER, known_at_us=100).column("event_id").to_pylist() == ["a"]
    assert log.read(SALES, USER, known_at_us=200).num_rows == 2


def test_read_of_a_version_shows_the_log_as_it_was(log: EventLog) -> None:
    version = log.append(SALES, events((1, "a", 1)), ingested_us=0).versions["user"]
    log.append(SALES, events((1, "b", 1)), ingested_us=0)
    assert log.read(SALES, USER, version=version).column("event_id").to_pylist() == ["a"]


def test_read_of_the_version_before_the_first_append_is_empty(log: EventLog) -> None:
    before = log.version(SALES, USER)
    log.append(SALES, events((1, "a", 1)), ingested_us=0)
    assert log.read(SALES, USER, version=before).num_rows == 0


def test_unknown_column_is_refused_with_those_that_exist(log: EventLog) -> None:
    with pytest.raises(UnknownColumnError, match="amount"):
        log.read_bucket(SALES, USER, 0, columns=["price"])


def test_own_ingestion_times_of_events_win(log: EventLog) -> None:
    rows = events((1, "a", 1), (1, "b", 2)).append_column(INGESTED, pa.array([5, 6]))
    log.append(SALES, rows, ingested_us=99)
    assert sorted(log.read(SALES, USER).column(INGESTED).to_pylist()) == [5, 6]


def test_statistics_tell_rows_times_and_buckets_without_reading(log: EventLog) -> None:
    log.append(SALES, events((1, "a", 5_000), (2, "b", 7_500), (3, "c", 6_000)), ingested_us=0)
    found = log.statistics(SALES, USER)
    assert (found.rows, found.min_time_us, found.max_time_us) == (3, 5_000, 8_000)
    assert sum(found.rows_by_bucket.values()) == 3
    assert found.size_bytes > 0


# ── Refusals ─────────────────────────────────────────────────────────────────────────


def test_another_number_of_buckets_is_refused_with_the_right_one(log: EventLog) -> None:
    log.append(SALES, events((1, "a", 1)), ingested_us=0)
    other = EventLog(log.root, n_buckets=8)
    with pytest.raises(BucketCountError, match=r"created with 4 buckets.*set storage\.buckets to 4"):
        other.append(SALES, events((1, "b", 1)), ingested_us=0)
    with pytest.raises(BucketCountError):
        other.read_bucket(SALES, USER, 0)


@pytest.mark.parametrize("column", ["user_id", "event_id", "at"])
def test_null_in_a_column_that_places_an_event_is_refused(log: EventLog, column: str) -> None:
    rows = events((1, "a", 1))
    at = rows.schema.get_field_index(column)
    rows = rows.set_column(at, column, pa.nulls(1, rows.schema.field(column).type))
    with pytest.raises(KeyColumnError, match=column):
        log.append(SALES, rows, ingested_us=0)
    assert log.version(SALES, USER) == -1


def test_missing_column_is_refused(log: EventLog) -> None:
    with pytest.raises(SchemaMismatchError, match="amount"):
        log.append(SALES, events((1, "a", 1)).drop_columns("amount"), ingested_us=0)


def test_column_that_a_source_gains_is_null_in_older_events(log: EventLog) -> None:
    log.append(SALES, events((1, "a", 1)), ingested_us=0)
    wider = make_source(extra=(("note", pa.string()),))
    log.append(wider, events((1, "b", 2)).append_column("note", pa.array(["hello"])), ingested_us=0)
    found = log.read(wider, USER, columns=["event_id", "note"]).sort_by("event_id")
    assert found.column("note").to_pylist() == [None, "hello"]


def test_column_that_changes_its_type_is_refused(log: EventLog) -> None:
    log.append(SALES, events((1, "a", 1)), ingested_us=0)
    changed = make_source(id_type=pa.int64())
    rows = events((1, "5", 1)).set_column(2, "event_id", pa.array([5]))
    with pytest.raises(SchemaMismatchError, match="event_id"):
        log.append(changed, rows, ingested_us=0)


# ── Several writers ──────────────────────────────────────────────────────────────────


def _meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something once, after the first append has checked and written and before it commits."""
    write = EntityAppend._write
    pending = [act]

    def interrupted(self: EntityAppend, bucket: int, rows: pa.Table, new: Any) -> Any:
        added = write(self, bucket, rows, new)
        if pending:
            pending.pop()()
        return added

    monkeypatch.setattr(EntityAppend, "_write", interrupted)


def test_id_that_somebody_else_appends_between_check_and_commit_is_still_one_event(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = EventLog(log.root, n_buckets=1), EventLog(log.root, n_buckets=1)
    one.append(SALES, events((1, "x", 1)), ingested_us=0)
    _meanwhile(monkeypatch, lambda: other.append(SALES, events((1, "a", 1), (1, "b", 1)), ingested_us=1))
    result = one.append(SALES, events((1, "b", 1), (1, "c", 1)), ingested_us=2)
    assert (result.accepted, result.duplicates) == (1, 1)
    found = dict(
        zip(*(one.read(SALES, USER).column(name).to_pylist() for name in ("event_id", INGESTED)), strict=True)
    )
    assert found == {"x": 0, "a": 1, "b": 1, "c": 2}
    assert one.read(SALES, USER).num_rows == 4


def test_append_that_loses_all_its_rows_to_somebody_else_commits_nothing(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = EventLog(log.root, n_buckets=1), EventLog(log.root, n_buckets=1)
    _meanwhile(monkeypatch, lambda: other.append(SALES, events((1, "a", 1)), ingested_us=1))
    result = one.append(SALES, events((1, "a", 1)), ingested_us=2)
    assert (result.accepted, result.duplicates) == (0, 1)
    assert one.version(SALES, USER) == 1
    folder = Path(log.root, "events", "sales", "user", "_bucket=0")
    assert len(list(folder.iterdir())) == 1, "the file of the loser is deleted"


def test_many_threads_appending_the_same_events_append_each_once(log: EventLog) -> None:
    barrier = threading.Barrier(4)
    accepted: list[int] = []

    def run(offset: int) -> None:
        mine = EventLog(log.root, n_buckets=4)
        rows = events(*[(user, f"e{user}", user) for user in range(offset, offset + 30)])
        barrier.wait()
        accepted.extend(
            mine.append(SALES, part, ingested_us=0).accepted for part in (rows.slice(0, 15), rows.slice(15))
        )

    threads = [threading.Thread(target=run, args=(offset,)) for offset in (0, 10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = log.read(SALES, USER).column("event_id").to_pylist()
    assert sorted(ids) == sorted(f"e{user}" for user in range(60))
    assert sum(accepted) == 60


def test_stream_is_applied_once_and_in_the_same_commit_as_its_events(log: EventLog) -> None:
    assert log.progress(SALES, USER, ["s"]) == {"s": None}
    first = Progress(before={"s": None}, after={"s": (5, 1)})
    log.append(SALES, events((1, "a", 1)), ingested_us=0, entity=USER, progress=first)
    assert log.progress(SALES, USER, ["s", "t"]) == {"s": (5, 1), "t": None}
    with pytest.raises(StaleProgressError, match="up to 5-1, not nothing"):
        log.append(SALES, events((1, "b", 1)), ingested_us=0, entity=USER, progress=first)
    assert log.read(SALES, USER).column("event_id").to_pylist() == ["a"]


def test_progress_moves_on_even_if_every_event_is_known(log: EventLog) -> None:
    log.append(SALES, events((1, "a", 1)), ingested_us=0)
    moved = Progress(before={"s": None}, after={"s": (2**41, 2**40)})
    assert log.append(SALES, events((1, "a", 1)), ingested_us=0, entity=USER, progress=moved).accepted == 0
    assert log.progress(SALES, USER, ["s"]) == {"s": (2**41, 2**40)}


def test_two_sinks_at_once_apply_a_stream_once(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    same = Progress(before={"s": None}, after={"s": (5, 1)})
    other = EventLog(log.root, n_buckets=4)
    _meanwhile(
        monkeypatch,
        lambda: other.append(SALES, events((1, "a", 1)), ingested_us=0, entity=USER, progress=same),
    )
    with pytest.raises(StaleProgressError):
        log.append(SALES, events((1, "a", 1), (2, "b", 1)), ingested_us=0, entity=USER, progress=same)
    assert log.read(SALES, USER).column("event_id").to_pylist() == ["a"]


# ── Compaction ───────────────────────────────────────────────────────────────────────


def test_compaction_merges_small_files_and_changes_no_row(log: EventLog) -> None:
    one = EventLog(log.root, n_buckets=1)
    for number in range(6):
        one.append(SALES, events((1, f"e{number}", 10 - number)), ingested_us=number)
    before = one.read(SALES, USER).sort_by("event_id")
    assert one.compact(SALES, USER, min_files=7) == 0
    assert one.compact(SALES, USER, min_files=6) == 6
    assert one.statistics(SALES, USER).files == 1
    assert one.read(SALES, USER).sort_by("event_id").equals(before)
    assert one.read(SALES, USER).column("at").to_pylist() == sorted(before.column("at").to_pylist())
    assert one.append(SALES, events((1, "e3", 1)), ingested_us=0).duplicates == 1


def test_compaction_gives_way_to_an_append_and_keeps_its_rows(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    one = EventLog(log.root, n_buckets=1)
    for number in range(3):
        one.append(SALES, events((1, f"e{number}", number)), ingested_us=0)
    write = Table.write
    pending = [lambda: one.append(SALES, events((1, "late", 9)), ingested_us=0)]

    def interrupted(self: Any, rows: pa.Table, **rest: Any) -> Any:
        added = write(self, rows, **rest)
        if pending:
            pending.pop()()
        return added

    monkeypatch.setattr(Table, "write", interrupted)
    assert one.compact(SALES, USER, min_files=2) == 3
    assert sorted(one.read(SALES, USER).column("event_id").to_pylist()) == ["e0", "e1", "e2", "late"]


def test_event_log_is_copied_as_its_configuration(log: EventLog) -> None:
    log.append(SALES, events((1, "a", 1)), ingested_us=0)
    again = copy.copy(log)  # what pickling does: __reduce__
    assert (again.root, again.n_buckets) == (log.root, log.n_buckets)
    assert again.read(SALES, USER).num_rows == 1


def test_log_behind_an_object_store_address_does_the_same(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), n_buckets=1)
    log.root = f"file://{tmp_path}"  # no plain path: goes through the object store's client
    assert log.append(SALES, events((1, "a", 1), (2, "b", 2)), ingested_us=0).accepted == 2
    assert log.append(SALES, events((1, "a", 1), (2, "c", 2)), ingested_us=0).duplicates == 1
    assert log.compact(SALES, USER, min_files=2) == 2
    assert sorted(EventLog(str(tmp_path), n_buckets=1).read(SALES, USER).column("event_id").to_pylist()) == [
        "a",
        "b",
        "c",
    ]
