"""The catalog's tables, and the rows that come out of them.

Evidence (model versions, alias changes, routes, verdicts) and the dictionary of categories are
append-only: triggers refuse every UPDATE and DELETE, whoever sends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    DDL,
    JSON,
    BigInteger,
    Column,
    ForeignKeyConstraint,
    Identity,
    Integer,
    MetaData,
    Named,
    Table,
    TypedColumns,
    event,
)

SCHEMA_VERSION: Final = 1

Document = Mapping[str, Any]
"""A JSON object."""


metadata = MetaData()
_RowId = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows by itself for INTEGER alone.


class _SchemaColumns(TypedColumns):
    version = Column(Integer, primary_key=True)


class _DefinitionColumns(TypedColumns):
    kind: Named[str] = Column(primary_key=True)
    name: Named[str] = Column(primary_key=True)
    version = Column(Integer, primary_key=True, autoincrement=False)
    content_hash: Named[str]
    document = Column(JSON, nullable=False)
    created_us = Column(BigInteger, nullable=False)
    retired_us = Column(BigInteger, nullable=True)


class _VersionColumns(TypedColumns):
    model: Named[str] = Column(primary_key=True)
    version = Column(Integer, primary_key=True, autoincrement=False)
    artifact: Named[str]
    signature = Column(JSON, nullable=False)
    metrics = Column(JSON, nullable=False)
    lineage = Column(JSON, nullable=False)
    profile_digest: Named[str | None]
    parameters = Column(JSON, nullable=False)
    created_us = Column(BigInteger, nullable=False)


class _AliasColumns(TypedColumns):
    model: Named[str] = Column(primary_key=True)
    alias: Named[str] = Column(primary_key=True)
    revision = Column(Integer, primary_key=True, autoincrement=False)
    version = Column(Integer, nullable=False)
    previous = Column(Integer, nullable=True)
    action: Named[str]
    reason: Named[str]
    evidence = Column(JSON, nullable=False)
    at_us = Column(BigInteger, nullable=False)


class _RouteColumns(TypedColumns):
    model: Named[str] = Column(primary_key=True)
    revision = Column(Integer, primary_key=True, autoincrement=False)
    document = Column(JSON, nullable=False)
    reason: Named[str]
    at_us = Column(BigInteger, nullable=False)


class _CategoryColumns(TypedColumns):
    source: Named[str] = Column(primary_key=True)
    column: Named[str] = Column(primary_key=True)
    code = Column(BigInteger, primary_key=True, autoincrement=False)
    text: Named[str]
    at_us = Column(BigInteger, nullable=False)


class _VerdictColumns(TypedColumns):
    id = Column(_RowId, Identity(), primary_key=True)
    model: Named[str] = Column(index=True)
    version = Column(Integer, nullable=True)
    kind: Named[str]
    document = Column(JSON, nullable=False)
    at_us = Column(BigInteger, nullable=False)


class _RunColumns(TypedColumns):
    id = Column(_RowId, Identity(), primary_key=True)
    kind: Named[str] = Column(index=True)
    subject: Named[str]
    started_us = Column(BigInteger, nullable=False)
    finished_us = Column(BigInteger, nullable=True)
    outcome: Named[str | None]
    report = Column(JSON, nullable=False)


class _ApiKeyColumns(TypedColumns):
    id: Named[str] = Column(primary_key=True)
    name: Named[str] = Column(index=True)
    scopes = Column(JSON, nullable=False)
    digest: Named[str]
    last_four: Named[str]
    created_us = Column(BigInteger, nullable=False)
    expires_us = Column(BigInteger, nullable=True)
    revoked_us = Column(BigInteger, nullable=True)


def _version_key() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["model", "version"], ["model_versions.model", "model_versions.version"])


schema_version = Table("catalog_schema", metadata, _SchemaColumns)
definitions = Table("definitions", metadata, _DefinitionColumns)
model_versions = Table("model_versions", metadata, _VersionColumns)
alias_changes = Table("alias_changes", metadata, _AliasColumns, _version_key())
routes = Table("routes", metadata, _RouteColumns)
categories = Table("categories", metadata, _CategoryColumns)
verdicts = Table("verdicts", metadata, _VerdictColumns)
runs = Table("runs", metadata, _RunColumns)
api_keys = Table("api_keys", metadata, _ApiKeyColumns)

_REFUSAL = "catalog: rows of %(table)s are append-only"
_NEVER = {
    "sqlite": """
        CREATE TRIGGER %(table)s_no_{verb} BEFORE {verb} ON %(table)s
        BEGIN SELECT RAISE(ABORT, '{refusal}'); END
    """,
    "postgresql": """
        CREATE FUNCTION %(table)s_no_{verb}() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN RAISE EXCEPTION '{refusal}'; END $$;
        CREATE TRIGGER %(table)s_no_{verb} BEFORE {verb} ON %(table)s
        FOR EACH ROW EXECUTE FUNCTION %(table)s_no_{verb}()
    """,
}
for _table in (model_versions, alias_changes, routes, verdicts, categories):
    for _dialect, _trigger in _NEVER.items():
        for _verb in ("update", "delete"):
            _ddl = DDL(_trigger.format(verb=_verb, refusal=_REFUSAL))  # type: ignore[no-untyped-call] # SQLAlchemy's
            event.listen(_table, "after_create", _ddl.execute_if(dialect=_dialect))


@dataclass(frozen=True, slots=True)
class DefinitionRow:
    """One version of a declaration; ``retired_us`` is set while nobody declares it any more."""

    kind: str
    name: str
    version: int
    content_hash: str
    document: Document
    created_us: int
    retired_us: int | None = None


@dataclass(frozen=True, slots=True)
class VersionRow:
    """One immutable model version."""

    model: str
    version: int
    artifact: str
    signature: Document
    metrics: Document
    lineage: Document
    profile_digest: str | None
    parameters: Document
    created_us: int


@dataclass(frozen=True, slots=True)
class AliasRow:
    """One change of an alias; the one with the highest revision is where the alias points."""

    model: str
    alias: str
    revision: int
    version: int
    previous: int | None
    action: str
    reason: str
    evidence: Document
    at_us: int


@dataclass(frozen=True, slots=True)
class RouteRow:
    """One revision of a model's routing document."""

    model: str
    revision: int
    document: Document
    reason: str
    at_us: int


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """What a gate, a monitor or an experiment concluded."""

    id: int
    model: str
    version: int | None
    kind: str
    document: Document
    at_us: int


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run of a job: unfinished while ``finished_us`` is None."""

    id: int
    kind: str
    subject: str
    started_us: int
    finished_us: int | None
    outcome: str | None
    report: Document


@dataclass(frozen=True, slots=True)
class ApiKeyRow:
    """An API key: a hash of it, never the key; it works until ``expires_us`` or ``revoked_us``."""

    id: str
    name: str
    scopes: tuple[str, ...]
    digest: str
    last_four: str
    created_us: int
    expires_us: int | None = None
    revoked_us: int | None = None
