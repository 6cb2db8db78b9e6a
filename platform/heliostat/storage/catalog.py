"""The catalog: what is defined, which model versions exist, who serves, and what was decided.

SQLAlchemy Core on SQLite (one file, write-ahead log) by default, on PostgreSQL by URL. All
access is one of two transactions: ``with catalog.read() as rows`` sees one snapshot,
``with catalog.write() as rows`` is the only writer of that catalog until it ends. So whoever
reads a revision inside `Catalog.write` and appends the next one has compared and swapped:
SQLite's ``BEGIN IMMEDIATE`` and a transaction-scoped advisory lock in PostgreSQL give both
databases the same meaning. Writes are rare (a training, a promotion, a verdict) and short.

Rows that are evidence (model versions, alias changes, routes, verdicts) are append-only, and
the database itself refuses to change or delete them. What is current is the newest of them:
there is no second copy that could disagree with its history.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import orjson
from sqlalchemy import Connection, Engine, Select, create_engine, event, func, insert, inspect, select, text, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from heliostat.errors import CatalogSchemaError, CatalogUnavailableError
from heliostat.storage.catalog_tables import (
    SCHEMA_VERSION,
    AliasRow,
    ApiKeyRow,
    DefinitionRow,
    Document,
    RouteRow,
    RunRow,
    VerdictRow,
    VersionRow,
    alias_changes,
    api_keys,
    categories,
    definitions,
    metadata,
    model_versions,
    routes,
    runs,
    schema_version,
    verdicts,
)

_Row = TypeVar("_Row")

_BUSY_TIMEOUT_S: Final = 30
_TRY_AGAIN_S: Final = 0.01
_CODES_AT_ONCE: Final = 500
_CONNECT_TIMEOUT_S: Final = 10
_WRITER_LOCK: Final = 0x48454C494F  # "HELIO": the advisory lock that makes a PostgreSQL catalog single-writer.


class CatalogReader:
    """The rows as one snapshot shows them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _all(self, kind: type[_Row], query: Select[Any]) -> tuple[_Row, ...]:
        return tuple(kind(**row) for row in self._connection.execute(query).mappings())

    def definitions(self, kind: str | None = None, *, retired: bool = False) -> tuple[DefinitionRow, ...]:
        """Definitions by kind, name and version; the retired ones only when asked for."""
        query = select(definitions).order_by(definitions.c.kind, definitions.c.name, definitions.c.version)
        if kind is not None:
            query = query.where(definitions.c.kind == kind)
        if not retired:
            query = query.where(definitions.c.retired_us.is_(None))
        return self._all(DefinitionRow, query)

    def models(self) -> tuple[str, ...]:
        """Names of the models that have a version, sorted."""
        return tuple(
            self._connection.scalars(select(model_versions.c.model).distinct().order_by(model_versions.c.model))
        )

    def versions(self, model: str) -> tuple[VersionRow, ...]:
        """A model's versions, oldest first."""
        query = select(model_versions).where(model_versions.c.model == model).order_by(model_versions.c.version)
        return self._all(VersionRow, query)

    def version(self, model: str, version: int) -> VersionRow | None:
        """One version, or None."""
        query = select(model_versions).where(model_versions.c.model == model, model_versions.c.version == version)
        return next(iter(self._all(VersionRow, query)), None)

    def version_numbers(self, model: str) -> tuple[int, ...]:
        """The numbers of a model's versions, ascending."""
        query = (
            select(model_versions.c.version).where(model_versions.c.model == model).order_by(model_versions.c.version)
        )
        return tuple(self._connection.scalars(query))

    def aliases(self, model: str) -> tuple[AliasRow, ...]:
        """Where each alias of a model points now, by name."""
        newest = (
            select(alias_changes.c.alias, func.max(alias_changes.c.revision).label("revision"))
            .where(alias_changes.c.model == model)
            .group_by(alias_changes.c.alias)
            .subquery()
        )
        query = (
            select(alias_changes)
            .join(newest, (alias_changes.c.alias == newest.c.alias) & (alias_changes.c.revision == newest.c.revision))
            .where(alias_changes.c.model == model)
            .order_by(alias_changes.c.alias)
        )
        return self._all(AliasRow, query)

    def alias(self, model: str, alias: str) -> AliasRow | None:
        """Where an alias points now, or None."""
        return next((row for row in self.aliases(model) if row.alias == alias), None)

    def alias_history(self, model: str, alias: str | None = None) -> tuple[AliasRow, ...]:
        """Every change of a model's aliases, oldest first."""
        query = select(alias_changes).where(alias_changes.c.model == model)
        if alias is not None:
            query = query.where(alias_changes.c.alias == alias)
        query = query.order_by(alias_changes.c.at_us, alias_changes.c.alias, alias_changes.c.revision)
        return self._all(AliasRow, query)

    def route(self, model: str) -> RouteRow | None:
        """A model's current routing document, or None."""
        query = select(routes).where(routes.c.model == model).order_by(routes.c.revision.desc()).limit(1)
        return next(iter(self._all(RouteRow, query)), None)

    def route_history(self, model: str) -> tuple[RouteRow, ...]:
        """Every routing document of a model, oldest first."""
        query = select(routes).where(routes.c.model == model).order_by(routes.c.revision)
        return self._all(RouteRow, query)

    def verdicts(
        self, model: str, *, version: int | None = None, kind: str | None = None, limit: int = 100
    ) -> tuple[VerdictRow, ...]:
        """Verdicts on a model, newest first."""
        query = select(verdicts).where(verdicts.c.model == model)
        if version is not None:
            query = query.where(verdicts.c.version == version)
        if kind is not None:
            query = query.where(verdicts.c.kind == kind)
        query = query.order_by(verdicts.c.id.desc()).limit(limit)
        return self._all(VerdictRow, query)

    def runs(self, kind: str | None = None, *, limit: int = 100) -> tuple[RunRow, ...]:
        """Runs of jobs, newest first."""
        query = select(runs).order_by(runs.c.id.desc()).limit(limit)
        if kind is not None:
            query = query.where(runs.c.kind == kind)
        return self._all(RunRow, query)

    def api_keys(self) -> tuple[ApiKeyRow, ...]:
        """All API keys, oldest first: hashes of them."""
        query = select(api_keys).order_by(api_keys.c.created_us, api_keys.c.id)
        found = self._connection.execute(query).mappings()
        return tuple(ApiKeyRow(**{**row, "scopes": tuple(row["scopes"])}) for row in found)

    def has_categories(self, source: str, column: str) -> bool:
        """Whether the dictionary says anything of a source's column."""
        which = (categories.c.source == source) & (categories.c.column == column)
        return self._connection.scalar(select(categories.c.code).where(which).limit(1)) is not None

    def categories(self, source: str, column: str, codes: Iterable[int]) -> dict[int, str]:
        """What the dictionary says of some codes of a source's column: text by code."""
        found: dict[int, str] = {}
        asked = list(codes)
        for part in (asked[first : first + _CODES_AT_ONCE] for first in range(0, len(asked), _CODES_AT_ONCE)):
            query = select(categories.c.code, categories.c.text).where(
                (categories.c.source == source) & (categories.c.column == column) & categories.c.code.in_(part)
            )
            found.update({int(code): str(text) for code, text in self._connection.execute(query)})
        return found


class CatalogWriter(CatalogReader):
    """The rows inside the one write transaction: nothing that it reads can change before it ends."""

    def add_definition(self, row: DefinitionRow) -> None:
        """Store a new version of a declaration."""
        self._connection.execute(insert(definitions).values(**_as_values(row)))

    def retire_definition(self, kind: str, name: str, version: int, *, retired_us: int) -> None:
        """Mark a version as no longer declared."""
        self._change_definition(kind, name, version, retired_us=retired_us)

    def refresh_definition(self, kind: str, name: str, version: int, document: Document) -> None:
        """Replace what is said about a version (its meaning stays, see ``content_hash``) and declare it again."""
        self._change_definition(kind, name, version, document=document, retired_us=None)

    def _change_definition(self, kind: str, name: str, version: int, **values: Any) -> None:  # noqa: ANN401 - columns
        columns = definitions.c
        which = (columns.kind == kind) & (columns.name == name) & (columns.version == version)
        self._connection.execute(update(definitions).where(which).values(**values))

    def add_version(self, row: VersionRow) -> None:
        """Store a model version; it can't be changed afterwards."""
        self._connection.execute(insert(model_versions).values(**_as_values(row)))

    def add_alias_change(self, row: AliasRow) -> None:
        """Move an alias: ``revision`` is one above the current one, or 1."""
        self._connection.execute(insert(alias_changes).values(**_as_values(row)))

    def add_route(self, row: RouteRow) -> None:
        """Replace a model's routing document: ``revision`` is one above the current one, or 1."""
        self._connection.execute(insert(routes).values(**_as_values(row)))

    def add_categories(self, source: str, column: str, texts: Mapping[int, str], *, at_us: int) -> None:
        """Add to the dictionary of a source's column; what it says of a code can't be changed afterwards."""
        shared = {"source": source, "column": column, "at_us": at_us}
        values = [{**shared, "code": code, "text": each} for code, each in texts.items()]
        self._connection.execute(insert(categories), values)

    def add_verdict(self, model: str, version: int | None, kind: str, document: Document, *, at_us: int) -> int:
        """Record what was concluded; returns the verdict's number."""
        values = {"model": model, "version": version, "kind": kind, "document": document, "at_us": at_us}
        return int(self._connection.execute(insert(verdicts).values(**values).returning(verdicts.c.id)).scalar_one())

    def add_api_key(self, row: ApiKeyRow) -> None:
        """Store an API key."""
        self._connection.execute(insert(api_keys).values(**_as_values(row)))

    def revoke_api_keys(self, ids: Iterable[str], *, revoked_us: int) -> None:
        """Stop API keys; those that are stopped already stay as they are."""
        which = api_keys.c.id.in_(list(ids)) & api_keys.c.revoked_us.is_(None)
        self._connection.execute(update(api_keys).where(which).values(revoked_us=revoked_us))

    def start_run(self, kind: str, subject: str, *, started_us: int) -> int:
        """Record that a job began; returns the run's number."""
        values = {"kind": kind, "subject": subject, "started_us": started_us, "report": {}}
        return int(self._connection.execute(insert(runs).values(**values).returning(runs.c.id)).scalar_one())

    def finish_run(self, run_id: int, outcome: str, report: Document, *, finished_us: int) -> None:
        """Record how a job ended."""
        self._connection.execute(
            update(runs).where(runs.c.id == run_id).values(outcome=outcome, report=report, finished_us=finished_us)
        )


class Catalog:
    """An open catalog. Threads may share one; a process opens its own.

    Args:
        engine: The database, with its schema in place; see `Catalog.open`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str) -> Catalog:
        """Open a catalog, creating its tables when they are missing; any number of processes at once may.

        Args:
            url: ``sqlite:////folder/catalog.db`` or ``postgresql://user:password@host/database``.

        Raises:
            CatalogUnavailableError: If the database can't be reached or used.
            CatalogSchemaError: If another release of Heliostat made its tables.
        """
        try:
            engine = _engine_for(make_url(url))
        except (ArgumentError, NoSuchModuleError, ImportError, OSError) as error:
            raise CatalogUnavailableError(_hidden(url), _reason(error)) from error
        catalog = cls(engine)
        try:
            catalog._ensure_schema()
        except BaseException:
            engine.dispose()
            raise
        return catalog

    @property
    def url(self) -> str:
        """Where it is, with any password hidden."""
        return self._engine.url.render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[CatalogReader]:
        """A read-only transaction.

        Raises:
            CatalogUnavailableError: If the database doesn't answer.
        """
        # PostgreSQL's default isolation shows every statement another state; SQLite's shows one snapshot.
        options = {"isolation_level": "REPEATABLE READ"} if self._engine.dialect.name == "postgresql" else {}
        with _translated(self.url), self._engine.connect().execution_options(**options) as connection:
            yield CatalogReader(connection)

    @contextmanager
    def write(self) -> Iterator[CatalogWriter]:
        """The write transaction: waits for other writers, commits at the end, rolls back on an exception.

        Raises:
            CatalogUnavailableError: If the database doesn't answer, or another writer holds it too long.
        """
        with (
            _translated(self.url),
            self._engine.connect().execution_options(heliostat_writes=True) as connection,
            connection.begin(),
        ):
            if connection.dialect.name == "postgresql":
                connection.execute(text(f"SET LOCAL lock_timeout = '{_BUSY_TIMEOUT_S}s'"))
                connection.execute(select(func.pg_advisory_xact_lock(_WRITER_LOCK)))
            yield CatalogWriter(connection)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        """The catalog itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _ensure_schema(self) -> None:
        found = self._schema_version()
        if found is None:
            with self.write() as rows:
                connection = rows._connection
                metadata.create_all(connection)
                if connection.scalar(select(schema_version.c.version)) is None:
                    connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
            found = self._schema_version()
        if found != SCHEMA_VERSION:
            raise CatalogSchemaError(self.url, int(found or 0), SCHEMA_VERSION)
        if self._lacks_tables():  # a later release brought more of them
            with self.write() as rows:
                metadata.create_all(rows._connection)

    def _lacks_tables(self) -> bool:
        with _translated(self.url), self._engine.connect() as connection:
            return not set(metadata.tables) <= set(inspect(connection).get_table_names())

    def _schema_version(self) -> int | None:
        with _translated(self.url), self._engine.connect() as connection:
            if not inspect(connection).has_table(schema_version.name):
                return None
            return connection.scalar(select(schema_version.c.version))


def _as_values(row: DefinitionRow | VersionRow | AliasRow | RouteRow | ApiKeyRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__}


def _to_json(value: object) -> str:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()


def _engine_for(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(
            url,
            json_serializer=_to_json,
            json_deserializer=orjson.loads,
            pool_pre_ping=True,
            connect_args={"connect_timeout": _CONNECT_TIMEOUT_S} if url.get_backend_name() == "postgresql" else {},
        )
    if not url.database or url.database == ":memory:":
        raise CatalogUnavailableError(str(url), "a catalog in memory can't be shared by processes; name a file")
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url,
        json_serializer=_to_json,
        json_deserializer=orjson.loads,
        connect_args={"timeout": _BUSY_TIMEOUT_S},
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:  # noqa: ANN401 - sqlite3's own connection
    connection.isolation_level = None  # the driver must not begin transactions by itself: _begin_sqlite does
    _use_wal(connection)
    for pragma in ("synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _use_wal(connection: Any) -> None:  # noqa: ANN401 - as above
    """Set the journal's mode, once for a file: SQLite waits for nobody there, so who comes second tries again."""
    limit = time.monotonic() + _BUSY_TIMEOUT_S
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > limit:
                raise
            time.sleep(_TRY_AGAIN_S)


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes the lock at once: a reader that turns writer halfway fails instead of waiting.
    writes = connection.get_execution_options().get("heliostat_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn what a driver says into an error that names the setting; a broken constraint stays what it is."""
    try:
        yield
    except IntegrityError:
        raise
    except (DBAPIError, PoolTimeoutError) as error:
        raise CatalogUnavailableError(url, _reason(error)) from error


def _reason(error: Exception) -> str:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return f"{lines[0]}; for PostgreSQL install heliostat[cluster]" if isinstance(error, ImportError) else lines[0]


def _hidden(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "a URL that can't be read"  # and so isn't repeated: it may hold a password
