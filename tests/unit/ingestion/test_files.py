"""Event files as batches: every row is counted, and one bad line costs one row."""

from __future__ import annotations

import gzip
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliostat.errors import HeliostatError, InvalidValueError, MissingFileError, SchemaMismatchError
from heliostat.features.definitions import Entity, EventSource
from heliostat.ingestion.checking import EventCheck
from heliostat.ingestion.files import Batch, event_files, read_ahead, read_batches
from heliostat.schema import TIMESTAMP

SALES = EventSource(
    "sales",
    schema=pa.schema([("user_id", pa.int64()), ("event_id", pa.string()), ("at", TIMESTAMP), ("note", pa.string())]),
    entity=Entity("user", keys={"user_id": "int64"}),
    event_time="at",
    event_id="event_id",
)
CHECK = EventCheck(SALES, future_tolerance_us=0)
HEADER = "event_id,extra,user_id,at,note\n"


def _read(file: Path, batch_rows: int = 1000) -> list[Batch]:
    return list(read_batches(file, CHECK, batch_rows=batch_rows))


def _csv(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "events.csv"
    file.write_text(HEADER + text)
    return file


def test_folder_stands_for_the_event_files_in_it(tmp_path: Path) -> None:
    for name in ("b.csv", "a.parquet", "deep/c.csv.gz", "deep/notes.txt", ".hidden.csv", "_SUCCESS"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [each.name for each in event_files([tmp_path])] == ["a.parquet", "b.csv", "c.csv.gz"]
    assert len(event_files([tmp_path, tmp_path / "b.csv"])) == 3


@pytest.mark.parametrize(
    ("make", "error", "fix"),
    [
        (lambda _: None, MissingFileError, "check the path"),
        (lambda path: path.mkdir(), MissingFileError, r"put files with .*\.parquet"),
        (lambda path: path.touch(), InvalidValueError, r"ends with .*\.csv"),
    ],
)
def test_path_that_names_no_event_file_is_refused(
    tmp_path: Path, make: object, error: type[HeliostatError], fix: str
) -> None:
    path = tmp_path / "events.xls"
    make(path)  # type: ignore[operator]
    with pytest.raises(error, match=fix):
        event_files([path])


def test_csv_cells_are_texts_and_empty_ones_null(tmp_path: Path) -> None:
    (batch,) = _read(_csv(tmp_path, 'a,?,1,2020-01-01,"two\nlines, ""quoted"""\nb,?,x,,\n'))
    assert batch.rows.to_pydict() == {
        "user_id": ["1", "x"],
        "event_id": ["a", "b"],
        "at": ["2020-01-01", None],
        "note": ['two\nlines, "quoted"', None],
    }
    assert batch.numbers.tolist() == [0, 1]


def test_lines_with_a_wrong_number_of_cells_are_told_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    lines = [f"e{row},?,1,2020-01-01,n" if row % 3 else f"e{row},?" for row in range(10)]
    batches = _read(_csv(tmp_path, "\n".join(lines)), batch_rows=2)
    numbers = [number for batch in batches for number in batch.numbers.tolist()]
    ids = [name for batch in batches for name in batch.rows.column("event_id").to_pylist()]
    assert [f"e{number}" for number in numbers] == ids
    assert numbers == [1, 2, 4, 5, 7, 8]
    broken = [each for batch in batches for each in batch.broken]
    assert [number for number, _, _ in broken] == [0, 3, 6, 9]
    assert broken[0][1:] == ("e0,?", "it has 2 cells, and the header 5")


def test_csv_of_which_every_line_is_broken_still_tells_them(tmp_path: Path) -> None:
    batches = _read(_csv(tmp_path, "a\nb\n"))
    assert [each[0] for batch in batches for each in batch.broken] == [0, 1]


def test_csv_may_be_compressed(tmp_path: Path) -> None:
    file = tmp_path / "events.csv.gz"
    file.write_bytes(gzip.compress(f"{HEADER}a,?,1,2020-01-01,n\n".encode()))
    assert [batch.rows.num_rows for batch in _read(file)] == [1]


def test_csv_with_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    assert sum(batch.rows.num_rows for batch in _read(_csv(tmp_path, ""))) == 0


def test_parquet_is_read_in_batches_with_row_numbers(tmp_path: Path) -> None:
    file = tmp_path / "events.parquet"
    at = pa.array(range(10), pa.timestamp("ms"))
    names = [str(row) for row in range(10)]
    pq.write_table(pa.table({"event_id": names, "user_id": range(10), "at": at, "note": names, "extra": names}), file)
    batches = _read(file, batch_rows=4)
    assert [batch.rows.num_rows for batch in batches] == [4, 4, 2]
    assert [number for batch in batches for number in batch.numbers.tolist()] == list(range(10))
    assert "extra" not in batches[0].rows.column_names


@pytest.mark.parametrize("name", ["events.csv", "events.parquet"])
def test_missing_column_is_refused_with_those_that_exist(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.endswith("csv"):
        file.write_text("event_id,user_id\na,1\n")
    else:
        pq.write_table(pa.table({"event_id": ["a"], "user_id": [1]}), file)
    with pytest.raises(SchemaMismatchError, match=r"'at' is missing \(there are: event_id, user_id\)"):
        _read(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.csv", b""),
        ("latin.csv", HEADER.encode() + b"\xe4,?,1,2020-01-01,n\n"),
        ("text.parquet", b"this is no parquet"),
        ("empty.parquet", b""),
        ("broken.csv.gz", b"\x1f\x8b\x00"),
    ],
)
def test_file_that_is_not_what_its_name_says_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InvalidValueError, match=name):
        _read(file)


def test_batches_that_are_read_ahead_are_the_same_and_so_are_their_errors(tmp_path: Path) -> None:
    file = _csv(tmp_path, "".join(f"e{number},x,{number},2020-01-01,n\n" for number in range(50)))
    plain = _read(file, batch_rows=7)
    ahead = list(read_ahead(read_batches(file, CHECK, batch_rows=7)))
    assert [each.rows for each in ahead] == [each.rows for each in plain]
    with pytest.raises(SchemaMismatchError):
        list(read_ahead(read_batches(_wrong(tmp_path), CHECK, batch_rows=7)))


def test_somebody_who_stops_reading_ahead_leaves_no_thread_behind(tmp_path: Path) -> None:
    file = _csv(tmp_path, "".join(f"e{number},x,{number},2020-01-01,n\n" for number in range(50)))
    batches = read_ahead(read_batches(file, CHECK, batch_rows=7))
    next(batches)
    batches.close()
    assert not [each.name for each in threading.enumerate() if each.name.startswith("read-ahead")]


def _wrong(tmp_path: Path) -> Path:
    file = tmp_path / "wrong.csv"
    file.write_text("a,b\n1,2\n")
    return file
