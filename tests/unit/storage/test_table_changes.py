from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from heliostat.clock import US_PER_DAY
from heliostat.features.definitions import Entity, EventSource
from heliostat.schema import TIMESTAMP
from heliostat.storage.delta import Commit, Table
from heliostat.storage.event_log import EventLog, stored_schema
from heliostat.storage.table_changes import NewFile, TableChanges, table_changes

USER = Entity("user", keys={"user_id": "int64"})
SALES = EventSource(
    "sales",
    schema=pa.schema({"id": pa.int64(), "user_id": pa.int64(), "at": TIMESTAMP}),
    entity=USER,
    event_time="at",
    event_id="id",
)


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(str(tmp_path), n_buckets=2)


def append(log: EventLog, first: int, users: list[int]) -> int:
    rows = [{"id": first + at, "user_id": user, "at": US_PER_DAY} for at, user in enumerate(users)]
    return log.append(SALES, pa.Table.from_pylist(rows, schema=SALES.schema), ingested_us=0).versions["user"]


def changes(log: EventLog, after: int) -> TableChanges:
    found = table_changes(log.table(SALES, USER), after=after, through=log.version(SALES, USER))
    assert found is not None
    return found


def of_bucket(bucket: int) -> list[int]:
    return [user for user in range(20) if USER.buckets(USER.encoded([str(user)]), 2).tolist() == [bucket]]


def test_only_buckets_with_new_events_have_new_files(log: EventLog) -> None:
    first = append(log, 0, list(range(20)))
    second = append(log, 100, of_bucket(1)[:2])
    found = changes(log, first)
    assert found.since("0", first) == ()
    (path,) = found.since("1", first) or ()
    assert log.table(SALES, USER).filesystem().get_file_info(path).is_file
    assert found.since("1", second) == ()
    assert len(changes(log, -1).since("1", -1) or ()) == 2


def test_merging_files_is_no_change(log: EventLog) -> None:
    for number in range(4):
        last = append(log, 100 * number, list(range(20)))
    assert log.compact(SALES, USER, min_files=2) > 0
    found = changes(log, last)
    assert (found.since("0", last), found.since("1", last)) == ((), ())
    # What came before the merge is still told file by file.
    assert len(changes(log, last - 1).since("0", last - 1) or ()) == 1


def test_a_bucket_that_rows_were_taken_from_says_so(log: EventLog) -> None:
    first = append(log, 0, list(range(20)))
    place: Table = log.table(SALES, USER)

    def prepare(_: object) -> Commit:
        file = next(each for each in place.files(place.current()).to_pylist() if each["partition._bucket"] == 0)
        return Commit(removes=[place.removal(file, deleted_ms=1)])

    last = place.commit(stored_schema(SALES), prepare)
    found = changes(log, first)
    assert found.since("0", first) is None
    assert found.since("0", last) == ()
    assert found.since("1", first) == ()


def test_a_log_that_was_cleaned_up_cant_tell(log: EventLog) -> None:
    first = append(log, 0, list(range(20)))
    last = append(log, 100, list(range(20)))
    Path(log.table(SALES, USER).uri, "_delta_log", f"{last:020d}.json").unlink()
    assert table_changes(log.table(SALES, USER), after=first, through=last) is None
    assert table_changes(log.table(SALES, USER), after=-1, through=5_000) is None


def test_files_are_told_by_version() -> None:
    found = TableChanges({"3": (NewFile("a", 4), NewFile("b", 6))}, {"3": 5})
    assert found.since("3", 4) is None
    assert found.since("3", 5) == ("b",)
    assert found.since("7", 0) == ()
