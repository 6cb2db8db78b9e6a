"""Rows leave a table in one commit, whoever else writes, and their old files only when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from heliostat.schema import TIMESTAMP
from heliostat.storage import erasure
from heliostat.storage.delta import Commit, Table
from heliostat.storage.erasure import Doomed, doomed_rows, erase_rows, uncommitted_with, vacuum
from heliostat.storage.places import subfolders

SCHEMA = pa.schema([("who", pa.string()), ("at", TIMESTAMP), ("_part", pa.int32())])


def rows(*who: str | None, first: int = 0) -> pa.Table:
    times = pa.array(range(first, first + len(who)), pa.int64()).cast(TIMESTAMP)
    return pa.table({"who": pa.array(who, pa.string()), "at": times})


def is_ann(table: pa.Table) -> NDArray[np.bool_]:
    return np.array([each == "ann" for each in table.column("who").to_pylist()], dtype=np.bool_)


ANN = Doomed(("who",), is_ann)


@pytest.fixture
def place(tmp_path: Path) -> Table:
    table = Table(str(tmp_path / "table"), {}, "_part")
    table.ensure(SCHEMA)
    return table


def add(place: Table, *who: str | None, part: int = 0, first: int = 0) -> str:
    written = place.write(rows(*who, first=first), value=str(part), ranges=["at"], repetitive=["who"])
    place.commit(SCHEMA, lambda _: Commit(adds=[written]))
    return written.path


def held(place: Table) -> list[str | None]:
    current = place.current()
    paths = sorted(place.files(current).column("path").to_pylist())
    return [who for path in paths for who in place.read(current, [path], columns=["who"]).column("who").to_pylist()]


def test_only_files_with_doomed_rows_are_written_anew_and_the_others_stay_as_they_are(place: Table) -> None:
    touched, untouched, whole = add(place, "b", "ann", None), add(place, "c", part=1), add(place, "ann", "ann")
    version = place.current().version()
    erased = erase_rows(place, ANN)
    assert (erased.rows, erased.files) == (3, 2)
    assert place.current().version() == version + 1
    files = set(place.files(place.current()).column("path").to_pylist())
    assert untouched in files
    assert not {touched, whole} & files
    assert sorted(held(place), key=str) == [None, "b", "c"]


def test_order_partition_and_statistics_of_the_other_rows_stay(place: Table) -> None:
    add(place, "ann", "z", "b", "ann", part=7, first=100)
    erase_rows(place, ANN)
    (file,) = place.files(place.current()).to_pylist()
    assert (file["partition._part"], file["num_records"]) == (7, 2)
    assert (file["min.at"].microsecond, file["max.at"].microsecond) == (0, 1000)
    assert held(place) == ["z", "b"]


def test_table_without_doomed_rows_gets_no_commit(place: Table) -> None:
    add(place, "b", None)
    version = place.current().version()
    assert erase_rows(place, ANN).rows == 0
    assert place.current().version() == version


def test_table_that_does_not_exist_is_left_alone(tmp_path: Path) -> None:
    nowhere = Table(str(tmp_path / "nowhere"), {}, None)
    assert (erase_rows(nowhere, ANN).rows, vacuum(nowhere), uncommitted_with(nowhere, ANN)) == (0, 0, 0)
    assert list(doomed_rows(nowhere, ANN, ["who"])) == []
    assert not (tmp_path / "nowhere").exists()


def test_rows_that_others_append_and_merge_meanwhile_are_looked_at_as_well(
    place: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(place, "ann", "b")
    add(place, "c")
    without, busy = erasure._without, [True]

    def interrupted(*given: Any) -> Any:
        done = without(*given)
        if busy:
            busy.pop()
            add(place, "ann", "d")
            place.compact(min_files=2, max_rows=100, sort_by="at", ranges=["at"])
        return done

    monkeypatch.setattr(erasure, "_without", interrupted)
    assert erase_rows(place, ANN).rows == 2
    assert sorted(held(place), key=str) == ["b", "c", "d"]
    left = {each.name for each in Path(place.uri, "_part=0").iterdir()}
    merged = place.files(place.current()).column("path").to_pylist()
    vacuum(place)
    assert {each.name for each in Path(place.uri, "_part=0").iterdir()} <= left
    assert [Path(place.uri, path).exists() for path in merged] == [True]


def test_doomed_rows_are_found_with_any_columns(place: Table) -> None:
    add(place, "ann", "b", "ann", first=5)
    (found,) = doomed_rows(place, ANN, ["at"])
    assert found.schema.names == ["at"]
    assert found.column("at").cast(pa.int64()).to_pylist() == [5, 7]


def test_old_files_stay_until_they_are_vacuumed_and_earlier_versions_with_them(place: Table) -> None:
    old = add(place, "ann", "b")
    before = place.current().version()
    erase_rows(place, ANN)
    earlier = place.open(before)
    assert earlier is not None
    assert place.read(earlier, [old], columns=["who"]).num_rows == 2
    assert vacuum(place, hours=24) == 0, "it was let go just now"
    assert vacuum(place) == 1
    assert not Path(place.uri, old).exists()
    version = place.current().version()
    assert vacuum(place) == 0
    assert place.current().version() == version, "nothing to delete leaves no trace"


def test_file_that_somebody_is_about_to_commit_survives_and_is_told(place: Table) -> None:
    add(place, "b")
    written = place.write(rows("ann"), value="0")
    assert vacuum(place) == 0
    assert uncommitted_with(place, ANN) == 1
    place.commit(SCHEMA, lambda _: Commit(adds=[written]))
    assert uncommitted_with(place, ANN) == 0
    assert erase_rows(place, ANN).rows == 1


def test_abandoned_file_goes_when_nothing_else_writes(place: Table) -> None:
    add(place, "b")
    abandoned = place.write(rows("ann"), value="0")
    Path(place.uri, "_part=0", "half.parquet").write_bytes(b"PAR1 half written")
    assert uncommitted_with(place, ANN) == 1
    assert vacuum(place, exclusive=True) == 2
    assert not Path(place.uri, abandoned.path).exists()
    assert held(place) == ["b"]


def test_folders_below_a_root_are_listed_by_name(tmp_path: Path) -> None:
    for name in ("events/b", "events/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "events" / "file").write_text("")
    assert subfolders(str(tmp_path), {}, "events") == ["a", "b"]
    assert subfolders(str(tmp_path), {}, "none", "such") == []
