"""Commits are compare-and-swap, and their failures say which table and why."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

from heliostat.errors import TableCommitError, TableUnavailableError
from heliostat.schema import TIMESTAMP
from heliostat.storage.delta import Commit, OpenTables, Table
from heliostat.storage.places import absolute_root

SCHEMA = pa.schema([("at", TIMESTAMP), ("n", pa.int64()), ("part", pa.string())])


def rows(*numbers: int) -> pa.Table:
    return pa.table({"at": pa.array(numbers, TIMESTAMP), "n": pa.array(numbers, pa.int64())})


@pytest.fixture
def table(tmp_path: Path) -> Table:
    created = Table(str(tmp_path / "t"), partition="part")
    created.ensure(SCHEMA)
    return created


def _numbers(table: Table) -> list[int]:
    current = table.current()
    paths = table.files(current).column("path").to_pylist()
    return sorted(table.read(current, paths, columns=["n"]).column("n").to_pylist())


def test_written_file_is_seen_only_after_its_commit(table: Table) -> None:
    add = table.write(rows(1, 2), value="x", ranges=["at", "n"])
    assert _numbers(table) == []
    assert table.commit(SCHEMA, lambda _: Commit(adds=[add])) == 1
    assert _numbers(table) == [1, 2]


def test_preparation_is_asked_again_after_somebody_elses_commit(table: Table) -> None:
    seen: list[int] = []

    def prepare(current: DeltaTable) -> Commit:
        seen.append(current.version())
        if len(seen) == 1:
            other = table.write(rows(1), value="x")
            table.commit(SCHEMA, lambda _: Commit(adds=[other]))
        return Commit(adds=[table.write(rows(2), value="x")])

    assert table.commit(SCHEMA, prepare) == 2
    assert seen == [0, 1]
    assert _numbers(table) == [1, 2]


def test_commit_whose_answer_was_lost_is_not_repeated(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = DeltaTable.create_write_transaction
    add = table.write(rows(7), value="x")

    def unheard(self: DeltaTable, *arguments: Any, **rest: Any) -> None:
        commit(self, *arguments, **rest)
        monkeypatch.undo()
        raise CommitFailedError("the answer was lost")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", unheard)
    assert table.commit(SCHEMA, lambda _: Commit(adds=[add])) == 1
    assert _numbers(table) == [7]


def test_commit_that_fails_with_nobody_else_about_says_why(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise CommitFailedError("the disk is full")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", refuse)
    with pytest.raises(TableCommitError, match=r"/t: the disk is full; .*storage\.root"):
        table.commit(SCHEMA, lambda _: Commit(adds=[table.write(rows(1), value="x")]))


def test_nothing_to_do_makes_no_version(table: Table) -> None:
    assert table.commit(SCHEMA, lambda _: None) == 0


def test_statistics_round_times_outwards_to_milliseconds(table: Table) -> None:
    add = table.write(rows(-1_001, 1, 1_001), value="x", ranges=["at", "n"])
    table.commit(SCHEMA, lambda _: Commit(adds=[add]))
    (found,) = table.files(table.current()).to_pylist()
    edges = [pa.scalar(found[name], TIMESTAMP).cast(pa.int64()).as_py() for name in ("min.at", "max.at")]
    assert edges == [-2_000, 2_000]
    assert (found["min.n"], found["max.n"], found["num_records"]) == (-1_001, 1_001, 3)


def test_time_that_no_calendar_names_is_kept_without_statistics(table: Table) -> None:
    far_us = 9_000_000_000_000_000_000
    add = table.write(rows(far_us), value="x", ranges=["at"])
    table.commit(SCHEMA, lambda _: Commit(adds=[add]))
    assert _numbers(table) == [far_us]
    assert table.files(table.current()).to_pylist()[0].get("min.at") is None


def test_place_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(TableCommitError, match="file/t"):
        Table(str(tmp_path / "file" / "t")).ensure(SCHEMA)


def test_table_that_is_gone_is_reported(tmp_path: Path) -> None:
    assert Table(str(tmp_path / "t")).open() is None
    with pytest.raises(TableUnavailableError, match="can't be read"):
        Table(str(tmp_path / "t")).current()


def test_log_that_is_damaged_is_reported(table: Table) -> None:
    Path(table.uri, "_delta_log", "00000000000000000000.json").write_text("nonsense")
    with pytest.raises(TableUnavailableError, match="/t"):
        table.open()


@pytest.mark.parametrize(
    ("root", "expected"),
    [("/data/", "/data"), ("file:///data", "/data"), ("s3://bucket/path/", "s3://bucket/path")],
)
def test_root_is_the_same_for_every_process(root: str, expected: str) -> None:
    assert absolute_root(root) == expected


def test_relative_root_starts_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_root("data") == str(tmp_path / "data")


# ── Tables that stay open ────────────────────────────────────────────────────────────


def _commit(table: Table, number: int) -> int:
    add = table.write(rows(number), value="x")
    return table.commit(SCHEMA, lambda _: Commit(adds=[add]))


@pytest.fixture
def kept(table: Table) -> Table:
    """The same table, as one that keeps it open has it."""
    return replace(table, kept=OpenTables())


def test_table_that_stays_open_is_read_once_and_is_as_it_is_now(
    table: Table, kept: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = Table.load
    monkeypatch.setattr(Table, "load", lambda self, version=None: (loads.append(self.uri), load(self, version))[1])
    for number in range(3):
        assert _commit(kept, number) == number + 1
        assert _numbers(kept) == list(range(number + 1))
    assert len(loads) == 1
    _commit(table, 3)
    assert _numbers(kept) == [0, 1, 2, 3]
    assert kept.open(1) is not kept.open()
    assert kept.open(1).version() == 1
    kept.kept.forget()
    loads.clear()
    assert _numbers(kept) == [0, 1, 2, 3]
    assert len(loads) == 1


def test_commits_of_those_who_keep_a_table_open_and_of_others_take_turns(table: Table, kept: Table) -> None:
    both = [kept, table, replace(table, kept=OpenTables())]
    for number in range(9):
        assert _commit(both[number % 3], number) == number + 1
    assert [_numbers(each) for each in both] == [list(range(9))] * 3


def test_somebody_elses_commit_during_a_preparation_is_seen(table: Table, kept: Table) -> None:
    seen: list[int] = []

    def prepare(current: DeltaTable) -> Commit:
        seen.append(current.version())
        if len(seen) == 1:
            _commit(table, 1)
        return Commit(adds=[kept.write(rows(2), value="x")])

    assert kept.commit(SCHEMA, prepare) == 2
    assert seen == [0, 1]
    assert _numbers(kept) == [1, 2]


def test_table_that_was_deleted_and_created_again_is_another(table: Table, kept: Table) -> None:
    for number in range(3):
        _commit(kept, number)
    shutil.rmtree(kept.uri)
    assert kept.open() is None
    with pytest.raises(TableUnavailableError):
        kept.current()
    table.ensure(SCHEMA)
    for number in range(7, 12):
        _commit(table, number)
    assert _numbers(kept) == [7, 8, 9, 10, 11]
    assert _commit(kept, 12) == 6
    assert _numbers(table) == [7, 8, 9, 10, 11, 12]


def test_what_stays_open_isnt_taken_along_into_another_process(kept: Table) -> None:
    _commit(kept, 1)
    taken = pickle.loads(pickle.dumps(kept))
    assert taken == kept
    assert _numbers(taken) == [1]
