"""Model versions, the aliases that say which of them serves, and the record of why.

A version is immutable: files (by digest), signature, metrics, lineage. What moves is an alias
(``production``, ``staging``, ``shadow``), by compare-and-swap: whoever moves it says at which
revision they saw it, and fails if it has moved since. Every move is kept with its evidence.
A version's status is read off that record (see `ModelVersion`), so it can't contradict it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from heliostat.clock import Clock, format_instant
from heliostat.errors import (
    GateFailedError,
    InvalidPackageError,
    InvalidValueError,
    PromotionConflictError,
    RollbackError,
    UnknownAliasError,
    UnknownModelError,
    UnknownVersionError,
)
from heliostat.models.definitions import ModelSpec
from heliostat.models.packaging import PROFILE_FILE, LoadedModel, ModelPackage, Signature
from heliostat.storage.artifact_store import ArtifactStore
from heliostat.storage.catalog import Catalog, CatalogReader
from heliostat.storage.catalog_tables import AliasRow, VersionRow

Document = Mapping[str, Any]
Selector = int | str
"""A version: its number, an alias, or ``latest``."""
Status = Literal["candidate", "live", "retired"]

PRODUCTION: Final = "production"
LATEST: Final = "latest"
GATE_VERDICT: Final = "gate"


@dataclass(frozen=True)
class ModelVersion:
    """A registered version.

    Attributes:
        model: The model's name.
        version: 1, 2, …
        artifact: Digest of its files.
        signature: Its features, in order.
        metrics: Figures from its evaluation.
        lineage: What it was made from: event-log version, definition hashes, data fingerprint, code revision.
        parameters: What it was trained with.
        profile_digest: SHA-256 of its reference profile, or None.
        created_us: When it was registered, microseconds since the epoch, UTC.
        aliases: Those that point at it now.
        status: ``candidate``: no alias has ever pointed at it; ``live``: one does; ``retired``: one did.
    """

    model: str
    version: int
    artifact: str
    signature: Signature
    metrics: Document
    lineage: Document
    parameters: Document
    profile_digest: str | None
    created_us: int
    aliases: tuple[str, ...] = ()
    status: Status = "candidate"

    @property
    def pinned_names(self) -> tuple[str, ...]:
        """What it was trained on, and nothing else: ``view@version__feature``, in the signature's order."""
        refs = {ref.partition("@")[0]: ref for ref in self.lineage.get("view_hashes", {})}
        parts = (name.partition("__") for name in self.signature.names)
        return tuple(f"{refs.get(view, view)}__{feature}" for view, _, feature in parts)

    def to_document(self) -> dict[str, Any]:
        """As a JSON object, for people and scripts."""
        return {
            "model": self.model,
            "version": self.version,
            "status": self.status,
            "aliases": list(self.aliases),
            "created": format_instant(self.created_us),
            "artifact": self.artifact,
            "features": list(self.signature.names),
            "categorical": list(self.signature.categorical),
            "inputs": dict(self.signature.inputs),
            "views": sorted(self.lineage.get("view_hashes", {})),
            "metrics": dict(self.metrics),
            "parameters": dict(self.parameters),
            "lineage": dict(self.lineage),
            "profile": self.profile_digest,
        }


class ModelRegistry:
    """Registers versions and moves aliases.

    Args:
        catalog: Where rows are kept.
        artifacts: Where files are kept.
        clock: Tells when things happened.
    """

    def __init__(self, catalog: Catalog, artifacts: ArtifactStore, clock: Clock) -> None:
        self._catalog, self._artifacts, self._clock = catalog, artifacts, clock

    def register(
        self, spec: ModelSpec, package: ModelPackage, *, lineage: Document, metrics: Document | None = None
    ) -> ModelVersion:
        """Store a trained model as the next version: a candidate, served by nobody yet.

        Args:
            spec: The model it is a version of.
            package: Its files.
            lineage: What it was made from; the hashes of all definitions are added.
            metrics: Figures from its evaluation; by default the package's.

        Raises:
            SignatureMismatchError: If it was trained on other features than ``spec`` declares.
            InvalidPackageError: If it has another objective, or its booster can't be read.
        """
        package.signature.check(Signature.of(spec).names, what=f"the declaration of model {spec.name!r}")
        if package.objective != spec.objective:
            raise InvalidPackageError(
                "objective", f"it is {package.objective}, model {spec.name!r} is {spec.objective}"
            )
        package.load()
        files = package.to_files()
        artifact = self._artifacts.put(files)
        definitions = {
            "model_hash": spec.content_hash,
            "label_hash": spec.label.content_hash,
            "view_hashes": {view.ref: view.content_hash for view in spec.views},
        }
        with self._catalog.write() as rows:
            numbers = rows.version_numbers(spec.name)
            row = VersionRow(
                model=spec.name,
                version=numbers[-1] + 1 if numbers else 1,
                artifact=artifact,
                signature=package.signature.to_document(),
                metrics=package.metrics if metrics is None else metrics,
                lineage={**lineage, **definitions},
                profile_digest=hashlib.sha256(files[PROFILE_FILE]).hexdigest() if PROFILE_FILE in files else None,
                parameters=package.parameters,
                created_us=self._clock.now_us(),
            )
            rows.add_version(row)
        return self.get(spec.name, row.version)

    def models(self) -> tuple[str, ...]:
        """Names of the models that have a version."""
        with self._catalog.read() as rows:
            return rows.models()

    def list(self, model: str | None = None) -> tuple[ModelVersion, ...]:
        """All versions of one model or of all, oldest first.

        Raises:
            UnknownModelError: If the named model has no version.
        """
        with self._catalog.read() as rows:
            if model is not None:
                _version_numbers(rows, model)
            names = rows.models() if model is None else (model,)
            return tuple(version for name in names for version in _versions(rows, name))

    def get(self, model: str, selector: Selector = LATEST) -> ModelVersion:
        """One version.

        Args:
            model: The model's name.
            selector: A number, an alias, or ``latest``.

        Raises:
            UnknownModelError: If the model has no version.
            UnknownVersionError: If there is no such version.
            UnknownAliasError: If the alias points nowhere.
        """
        with self._catalog.read() as rows:
            number = _resolve(rows, model, selector)
            return next(version for version in _versions(rows, model) if version.version == number)

    def package(self, model: str, selector: Selector = LATEST) -> ModelPackage:
        """A version's files, every byte checked.

        Raises:
            NotFoundError: As `get`.
            ArtifactMissingError: If its files are gone.
            ArtifactCorruptError: If its files were changed.
        """
        return ModelPackage.from_files(self._artifacts.get(self.get(model, selector).artifact))

    def load(self, model: str, selector: Selector = LATEST) -> LoadedModel:
        """A version, ready to predict.

        Raises:
            HeliostatError: As `package`.
        """
        return self.package(model, selector).load()

    def record_gate(self, model: str, version: int, report: Document) -> None:
        """Keep a gate's report on a version; `promote` looks at the newest.

        Args:
            model: The model's name.
            version: The version that was judged.
            report: ``{"passed": bool, "checks": [{"name", "passed", "reason", …}, …]}``.

        Raises:
            UnknownVersionError: If there is no such version.
        """
        with self._catalog.write() as rows:
            _resolve(rows, model, version)
            rows.add_verdict(model, version, GATE_VERDICT, report, at_us=self._clock.now_us())

    def gate_report(self, model: str, version: int) -> Document | None:
        """The newest gate report on a version, or None."""
        with self._catalog.read() as rows:
            return next(
                (row.document for row in rows.verdicts(model, version=version, kind=GATE_VERDICT, limit=1)), None
            )

    def alias(self, model: str, alias: str = PRODUCTION) -> AliasRow | None:
        """Where an alias points and at which revision, or None if it never was set."""
        with self._catalog.read() as rows:
            return rows.alias(model, alias)

    def promote(
        self,
        model: str,
        version: int,
        *,
        alias: str = PRODUCTION,
        expected_revision: int | None = None,
        gate: Document | None = None,
        evidence: Document | None = None,
        reason: str = "",
        force: bool = False,
    ) -> AliasRow:
        """Point an alias at a version.

        ``production`` needs a gate that was passed; other aliases serve nobody by themselves. An alias
        that points there already stays as it is, so that a repeated call does no harm.

        Args:
            model: The model's name.
            version: Where the alias is to point.
            alias: Which one.
            expected_revision: At which revision the caller saw it, 0 if unset; None: wherever it is now.
            gate: The gate's report; by default the newest recorded one (see `record_gate`).
            evidence: Anything else that the record should keep.
            reason: Why, in a sentence; needed to force.
            force: Promote without a passed gate.

        Returns:
            The alias as it is now.

        Raises:
            UnknownVersionError: If there is no such version.
            GateFailedError: If there is no gate report, or it says no.
            PromotionConflictError: If the alias isn't at ``expected_revision``.
            ArtifactCorruptError: If the version's files can't be trusted.
        """
        if force and not reason.strip():
            raise InvalidValueError("reason", reason, "a sentence that says why the gate is overruled")
        _check_alias(alias)
        row = self.get(model, version)
        report = gate if gate is not None else self.gate_report(model, row.version)
        if alias == PRODUCTION and not force:
            reasons = _refusals(report)
            if reasons:
                raise GateFailedError(model, row.version, reasons)
        self.package(model, row.version).load()
        return self._move(
            model,
            alias,
            row.version,
            action="force" if force else "promote",
            reason=reason,
            evidence={"gate": report, **(evidence or {})},
            expected_revision=expected_revision,
        )

    def rollback(
        self,
        model: str,
        alias: str = PRODUCTION,
        *,
        reason: str,
        expected_revision: int | None = None,
        evidence: Document | None = None,
    ) -> AliasRow:
        """Point an alias back at the version before; again, at the one before that.

        Args:
            model: The model's name.
            alias: Which one.
            reason: Why, in a sentence.
            expected_revision: At which revision the caller saw it; None: wherever it is now.
            evidence: Anything else that the record should keep.

        Returns:
            The alias as it is now.

        Raises:
            UnknownAliasError: If the alias was never set.
            RollbackError: If it has pointed at nothing else before.
            PromotionConflictError: If the alias isn't at ``expected_revision``, or moves meanwhile.
            ArtifactCorruptError: If the earlier version's files can't be trusted.
        """
        with self._catalog.read() as rows:
            _version_numbers(rows, model)
            past = rows.alias_history(model, alias)
            if not past:
                raise UnknownAliasError(model, alias, tuple(row.alias for row in rows.aliases(model)))
        earlier = _earlier(past)
        if len(earlier) < 2:
            raise RollbackError(model, alias, past[-1].version)
        self.package(model, earlier[-2]).load()
        return self._move(
            model,
            alias,
            earlier[-2],
            action="rollback",
            reason=reason,
            evidence=evidence or {},
            expected_revision=past[-1].revision if expected_revision is None else expected_revision,
        )

    def mark(self, model: str) -> tuple[int, tuple[tuple[str, int], ...]]:
        """What is different after a version was registered or an alias moved: the newest number, and revisions."""
        with self._catalog.read() as rows:
            numbers = rows.version_numbers(model)
            moved = tuple((row.alias, row.revision) for row in rows.aliases(model))
            return numbers[-1] if numbers else 0, moved

    def earlier(self, model: str, alias: str = PRODUCTION) -> tuple[int, ...]:
        """The versions that an alias pointed at before, the last one first; not those that were rolled back."""
        with self._catalog.read() as rows:
            return tuple(reversed(_earlier(rows.alias_history(model, alias))[:-1]))

    def history(self, model: str, alias: str | None = None) -> tuple[AliasRow, ...]:
        """Every move of a model's aliases, oldest first."""
        with self._catalog.read() as rows:
            return rows.alias_history(model, alias)

    def _move(
        self,
        model: str,
        alias: str,
        version: int,
        *,
        action: str,
        reason: str,
        evidence: Document,
        expected_revision: int | None,
    ) -> AliasRow:
        with self._catalog.write() as rows:
            current = rows.alias(model, alias)
            revision = 0 if current is None else current.revision
            if expected_revision is not None and revision != expected_revision:
                found = f"revision {revision}" + (f" (version {current.version})" if current else "")
                raise PromotionConflictError(model, alias, f"revision {expected_revision}", found)
            if current is not None and current.version == version:
                return current
            moved = AliasRow(
                model=model,
                alias=alias,
                revision=revision + 1,
                version=version,
                previous=None if current is None else current.version,
                action=action,
                reason=reason,
                evidence=evidence,
                at_us=self._clock.now_us(),
            )
            rows.add_alias_change(moved)
            return moved


def _version_numbers(rows: CatalogReader, model: str) -> tuple[int, ...]:
    numbers = rows.version_numbers(model)
    if not numbers:
        raise UnknownModelError(model, rows.models())
    return numbers


def _resolve(rows: CatalogReader, model: str, selector: Selector) -> int:
    numbers = _version_numbers(rows, model)
    if selector == LATEST:
        return numbers[-1]
    if isinstance(selector, str) and not selector.isdecimal():
        found = rows.alias(model, selector)
        if found is None:
            raise UnknownAliasError(model, selector, tuple(row.alias for row in rows.aliases(model)))
        return found.version
    if int(selector) not in numbers:
        raise UnknownVersionError(model, str(selector), tuple(str(number) for number in numbers))
    return int(selector)


def _versions(rows: CatalogReader, model: str) -> tuple[ModelVersion, ...]:
    current = rows.aliases(model)
    once = {row.version for row in rows.alias_history(model)}
    versions: list[ModelVersion] = []
    for row in rows.versions(model):
        aliases = tuple(alias.alias for alias in current if alias.version == row.version)
        versions.append(
            ModelVersion(
                model=row.model,
                version=row.version,
                artifact=row.artifact,
                signature=Signature.from_document(row.signature),
                metrics=row.metrics,
                lineage=row.lineage,
                parameters=row.parameters,
                profile_digest=row.profile_digest,
                created_us=row.created_us,
                aliases=aliases,
                status="live" if aliases else "retired" if row.version in once else "candidate",
            )
        )
    return tuple(versions)


def _earlier(past: tuple[AliasRow, ...]) -> list[int]:
    """The versions that a rollback can go back through, the current one last: a rollback undoes, it adds nothing."""
    stack: list[int] = []
    for row in past:
        if row.action == "rollback":
            stack.pop()
        else:
            stack.append(row.version)
    return stack


def _refusals(report: Document | None) -> tuple[str, ...]:
    if report is None:
        return ("it has no gate report",)
    if report.get("passed") is True:
        return ()
    failed = tuple(str(check["reason"]) for check in report.get("checks", ()) if not check["passed"])
    return failed or ("its gate report doesn't say that it passed",)


def _check_alias(alias: str) -> None:
    if not alias.isidentifier() or alias == LATEST:
        raise InvalidValueError("alias", alias, "a name such as production, staging or shadow, and not latest")
