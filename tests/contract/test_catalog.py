"""One contract, several databases: SQLite always, PostgreSQL where it is installed or a variable names one."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError

from heliostat.clock import ManualClock
from heliostat.errors import (
    CatalogSchemaError,
    CatalogUnavailableError,
    InvalidValueError,
    KeyNameTakenError,
    UnknownKeyError,
)
from heliostat.serving.keys import KeyBook
from heliostat.storage.catalog import Catalog
from heliostat.storage.catalog_tables import AliasRow, DefinitionRow, RouteRow, VersionRow

VERSION = VersionRow("churn", 1, "digest", {"features": []}, {"auc": 0.75}, {"log": 3}, None, {"seed": 1}, 1_000)
ALIAS = AliasRow("churn", "production", 1, 1, None, "promote", "first", {"gate": {"passed": True}}, 2_000)
ROUTE = RouteRow("churn", 1, {"coverage": 1.0}, "first", 3_000)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/of/its/own/catalog.db"
        return
    postgres_url = request.getfixturevalue("postgres_url")
    schema = f"catalog_{uuid.uuid4().hex}"
    server = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    yield f"{postgres_url}{'&' if '?' in postgres_url else '?'}options=-csearch_path%3D{schema}"
    with server.connect() as connection:
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    server.dispose()


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    with Catalog.open(url) as opened:
        yield opened


def _run(url: str, statement: str) -> None:
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            connection.execute(text(statement))
    finally:
        engine.dispose()


# ── Opening ─────────────────────────────────────────────────────────────────────────


def test_a_second_opening_finds_what_the_first_has_written(url: str) -> None:
    with Catalog.open(url) as first, first.write() as rows:
        rows.add_version(VERSION)
    with Catalog.open(url) as second, second.read() as rows:
        assert rows.versions("churn") == (VERSION,)


def test_tables_of_another_release_are_refused(url: str) -> None:
    Catalog.open(url).close()
    _run(url, "UPDATE catalog_schema SET version = 99")
    with pytest.raises(CatalogSchemaError, match="version 99"):
        Catalog.open(url)


@pytest.mark.parametrize(
    ("unusable", "reason"),
    [
        ("no url at all", "Could not parse"),
        ("nosql://host/database", "nosql"),
        ("sqlite://", "memory"),
        ("sqlite:////proc/nowhere/catalog.db", "No such file"),
    ],
)
def test_an_unusable_url_is_an_error_that_names_the_setting(unusable: str, reason: str) -> None:
    with pytest.raises(CatalogUnavailableError, match=rf"{reason}.*catalog\.url"):
        Catalog.open(unusable)


def test_a_password_is_never_told() -> None:
    for secretive in ("nosql://user:secret@host/database", "postgresql//user:secret@host"):
        with pytest.raises(CatalogUnavailableError) as told:
            Catalog.open(secretive)
        assert "secret" not in str(told.value)


def test_a_file_that_is_no_database_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    file = tmp_path / "catalog.db"
    file.write_bytes(b"not a database, but long enough to be looked at as one" * 100)
    with pytest.raises(CatalogUnavailableError, match=r"catalog\.url"):
        Catalog.open(f"sqlite:///{file}")


# ── Transactions ────────────────────────────────────────────────────────────────────


def test_an_exception_takes_everything_back(catalog: Catalog) -> None:
    def interrupted() -> None:
        with catalog.write() as rows:
            rows.add_version(VERSION)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with catalog.read() as rows:
        assert rows.models() == ()


def test_an_error_of_the_caller_is_not_taken_for_the_databases(catalog: Catalog) -> None:
    with pytest.raises(FileNotFoundError), catalog.write():
        raise FileNotFoundError("an artifact")


def test_a_reader_sees_one_snapshot_while_a_writer_commits(catalog: Catalog) -> None:
    with catalog.read() as before:
        assert before.versions("churn") == ()
        with catalog.write() as rows:
            rows.add_version(VERSION)
        assert before.versions("churn") == ()
    with catalog.read() as after:
        assert after.versions("churn") == (VERSION,)


def test_only_one_of_many_threads_swaps_a_revision(catalog: Catalog) -> None:
    with catalog.write() as rows:
        rows.add_route(ROUTE)
    together = threading.Barrier(8)
    won: list[int] = []

    def swap(number: int) -> None:
        together.wait()
        with catalog.write() as rows:
            current = rows.route("churn")
            if current is not None and current.revision == 1:
                rows.add_route(replace(ROUTE, revision=2, document={"by": number}))
                won.append(number)

    threads = [threading.Thread(target=swap, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with catalog.read() as rows:
        assert [row.document for row in rows.route_history("churn")[1:]] == [{"by": won[0]}]
    assert len(won) == 1


# ── Evidence ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("table", ["model_versions", "alias_changes", "routes", "verdicts"])
@pytest.mark.parametrize("change", ["UPDATE {} SET model = 'other'", "DELETE FROM {}"])
def test_the_database_itself_refuses_to_change_evidence(catalog: Catalog, url: str, table: str, change: str) -> None:
    with catalog.write() as rows:
        rows.add_version(VERSION)
        rows.add_alias_change(ALIAS)
        rows.add_route(ROUTE)
        rows.add_verdict("churn", 1, "gate", {"passed": True}, at_us=4_000)
    with pytest.raises(Exception, match=f"rows of {table} are append-only"):
        _run(url, change.format(table))


def test_a_version_is_there_once(catalog: Catalog) -> None:
    with catalog.write() as rows:
        rows.add_version(VERSION)
    with pytest.raises(IntegrityError), catalog.write() as rows:
        rows.add_version(replace(VERSION, artifact="another"))


def test_an_alias_points_at_a_version_that_exists(catalog: Catalog) -> None:
    with pytest.raises(IntegrityError), catalog.write() as rows:
        rows.add_alias_change(ALIAS)


# ── Rows ────────────────────────────────────────────────────────────────────────────


def test_definitions_come_back_by_kind_until_they_are_retired(catalog: Catalog) -> None:
    view = DefinitionRow("view", "behaviour", 1, "hash", {"features": ["a"]}, 5)
    source = DefinitionRow("source", "purchases", 1, "hash", {}, 5)
    with catalog.write() as rows:
        rows.add_definition(view)
        rows.add_definition(source)
        assert rows.definitions() == (source, view)
        rows.retire_definition("view", "behaviour", 1, retired_us=6)
    with catalog.read() as rows:
        assert rows.definitions("view") == ()
        assert rows.definitions("view", retired=True) == (replace(view, retired_us=6),)


def test_a_refreshed_definition_keeps_its_birthday(catalog: Catalog) -> None:
    with catalog.write() as rows:
        rows.add_definition(DefinitionRow("view", "behaviour", 1, "hash", {"owner": ""}, 5, retired_us=6))
        rows.refresh_definition("view", "behaviour", 1, {"owner": "growth"})
    with catalog.read() as rows:
        assert rows.definitions("view") == (DefinitionRow("view", "behaviour", 1, "hash", {"owner": "growth"}, 5),)


def test_an_alias_is_where_its_newest_change_points(catalog: Catalog) -> None:
    second = replace(ALIAS, revision=2, version=2, previous=1, at_us=2_001)
    staging = replace(ALIAS, alias="staging", at_us=2_002)
    with catalog.write() as rows:
        for version in (VERSION, replace(VERSION, version=2), replace(VERSION, model="spend")):
            rows.add_version(version)
        for change in (ALIAS, second, staging, replace(ALIAS, model="spend")):
            rows.add_alias_change(change)
    with catalog.read() as rows:
        assert rows.aliases("churn") == (second, staging)
        assert rows.alias("churn", "production") == second
        assert rows.alias("churn", "shadow") is None
        assert rows.alias_history("churn") == (ALIAS, second, staging)
        assert rows.alias_history("churn", "staging") == (staging,)


def test_verdicts_come_newest_first_and_by_version(catalog: Catalog) -> None:
    with catalog.write() as rows:
        first = rows.add_verdict("churn", 1, "drift", {"alarm": False}, at_us=1)
        second = rows.add_verdict("churn", 2, "drift", {"alarm": True}, at_us=2)
        rows.add_verdict("churn", None, "quality", {}, at_us=3)
    with catalog.read() as rows:
        assert [row.id for row in rows.verdicts("churn", kind="drift")] == [second, first]
        assert [row.document for row in rows.verdicts("churn", version=1)] == [{"alarm": False}]
        assert len(rows.verdicts("churn", limit=2)) == 2


def test_a_run_is_unfinished_until_it_ends(catalog: Catalog) -> None:
    with catalog.write() as rows:
        run = rows.start_run("ingest", "purchases", started_us=1)
    with catalog.read() as rows:
        assert [(row.outcome, row.finished_us) for row in rows.runs("ingest")] == [(None, None)]
    with catalog.write() as rows:
        rows.finish_run(run, "succeeded", {"accepted": 3}, finished_us=9)
    with catalog.read() as rows:
        (row,) = rows.runs("ingest")
        assert (row.id, row.outcome, row.report, row.finished_us) == (run, "succeeded", {"accepted": 3}, 9)
        assert rows.runs("train") == ()


def test_numbers_that_json_does_not_have_become_null(catalog: Catalog) -> None:
    with catalog.write() as rows:
        rows.add_version(replace(VERSION, metrics={"auc": float("nan"), "loss": float("inf")}))
    with catalog.read() as rows:
        assert rows.versions("churn")[0].metrics == {"auc": None, "loss": None}


def test_an_instant_far_in_the_future_keeps_its_microsecond(catalog: Catalog) -> None:
    with catalog.write() as rows:
        rows.add_version(replace(VERSION, created_us=4_102_444_800_000_001))
    with catalog.read() as rows:
        assert rows.versions("churn")[0].created_us == 4_102_444_800_000_001


# ── API keys ────────────────────────────────────────────────────────────────────────


def test_keys_are_kept_as_hashes_and_revoked_once_for_good(catalog: Catalog) -> None:
    at = ManualClock(5_000)
    book = KeyBook(lambda: catalog, at)
    made = book.create("shop", ["predict", "read", "read"], lasts_us=1_000)
    (row,) = book.list()
    assert (row.name, row.scopes, row.created_us, row.expires_us) == ("shop", ("predict", "read"), 5_000, 6_000)
    assert (row.revoked_us, made.key[-4:]) == (None, row.last_four)
    assert made.key not in repr(row)
    assert row.digest == hashlib.sha256(made.key.encode()).hexdigest()
    with pytest.raises(KeyNameTakenError, match="heliostat keys revoke shop"):
        book.create("shop", ["read"])
    at.advance(10)
    assert book.revoke("shop") == 1
    with pytest.raises(UnknownKeyError, match="'shop'"):
        book.revoke("shop")
    assert [each.revoked_us for each in book.list()] == [5_010]
    again = book.create("shop", ["admin"])
    assert again.key != made.key
    assert [each.revoked for each in book.known()] == [True, False]


def test_two_at_once_cant_both_make_a_key_of_one_name(catalog: Catalog) -> None:
    book = KeyBook(lambda: catalog, ManualClock(5_000))
    refused: list[Exception] = []

    def create() -> None:
        try:
            book.create("shop", ["read"])
        except KeyNameTakenError as error:
            refused.append(error)

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(refused), len(book.list())) == (5, 1)


@pytest.mark.parametrize(
    ("name", "scopes", "lasts_us"),
    [("", ["read"], None), ("a b", ["read"], None), ("a", [], None), ("a", ["everything"], None), ("a", ["read"], 0)],
)
def test_a_key_needs_a_name_scopes_that_exist_and_time(
    catalog: Catalog, name: str, scopes: list[str], lasts_us: int | None
) -> None:
    book = KeyBook(lambda: catalog, ManualClock(5_000))
    with pytest.raises(InvalidValueError, match="expected"):
        book.create(name, scopes, lasts_us=lasts_us)
    assert book.list() == ()


def test_a_catalog_of_an_older_release_gets_the_table_of_keys(url: str) -> None:
    Catalog.open(url).close()
    _run(url, "DROP TABLE api_keys")
    with Catalog.open(url) as catalog:
        book = KeyBook(lambda: catalog, ManualClock(5_000))
        book.create("shop", ["read"])
        assert [each.name for each in book.list()] == ["shop"]
