"""Every error that Heliostat raises on purpose.

    HeliostatError
    ├── DefinitionError            a declaration contradicts itself or the registry
    │   ├── UnknownColumnError  UnknownFeatureError  UnknownViewError  UnknownSourceError
    │   ├── DuplicateNameError  WindowError  ExpressionError
    ├── SettingsError              a setting is unknown, malformed or contradicts another
    │   └── UnknownSettingError
    ├── DataError                  rows, files or columns that don't fit
    │   ├── MissingFileError  SchemaMismatchError  KeyColumnError
    │   └── ExperimentDataError  MonitoringDataError
    ├── RequestError               a request that can't be read
    │   └── BodyTooLargeError
    ├── NotFoundError              the thing asked for doesn't exist
    │   └── UnknownModelError  UnknownVersionError  UnknownAliasError  UnknownEntityError
    ├── ConflictError              somebody else was first, or a rule forbids it
    └── StorageError               a store can't be reached, or can't be trusted
        └── OnlineStoreUnavailableError  CatalogUnavailableError  StorageNotSharedError

Each says what was asked, what exists and what to do. Each survives pickling, since Ray
carries errors between processes: the constructor's arguments equal ``args``, and the
text is built in ``__str__``.

``http_status`` is what the gateway answers; ``exit_code`` is what a job or the command
line ends with (see docs/operations.md).
"""

from __future__ import annotations

from typing import ClassVar

__all__ = ["HeliostatError"]


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) if names else "nothing yet"


class HeliostatError(Exception):
    """Base of every error that Heliostat raises on purpose."""

    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1


# ── Declarations ────────────────────────────────────────────────────────────────────


class DefinitionError(HeliostatError):
    """A declaration contradicts itself, its source, or what is registered."""

    http_status = 422
    exit_code = 2


class UnknownColumnError(DefinitionError):
    """A declaration names a column that its source doesn't have."""

    def __init__(self, column: str, where: str, known: tuple[str, ...]) -> None:
        super().__init__(column, where, known)
        self.column, self.where, self.known = column, where, known

    def __str__(self) -> str:
        return f"{self.where} names column {self.column!r}, which doesn't exist; there are: {_listed(self.known)}"


class UnknownFeatureError(DefinitionError):
    """A vector was asked for a feature that its view doesn't define."""

    def __init__(self, feature: str, view: str, known: tuple[str, ...]) -> None:
        super().__init__(feature, view, known)
        self.feature, self.view, self.known = feature, view, known

    def __str__(self) -> str:
        return f"feature view {self.view!r} has no feature {self.feature!r}; it defines: {_listed(self.known)}"


class UnknownViewError(DefinitionError):
    """A feature view was named that isn't declared."""

    http_status = 404
    exit_code = 4

    def __init__(self, view: str, known: tuple[str, ...]) -> None:
        super().__init__(view, known)
        self.view, self.known = view, known

    def __str__(self) -> str:
        return f"there is no feature view {self.view!r}; declared are: {_listed(self.known)}"


class UnknownSourceError(DefinitionError):
    """An event source was named that isn't declared."""

    http_status = 404
    exit_code = 4

    def __init__(self, source: str, known: tuple[str, ...]) -> None:
        super().__init__(source, known)
        self.source, self.known = source, known

    def __str__(self) -> str:
        return f"there is no event source {self.source!r}; declared are: {_listed(self.known)}"


class DuplicateNameError(DefinitionError):
    """Two declarations share a name."""

    def __init__(self, kind: str, name: str, where: str) -> None:
        super().__init__(kind, name, where)
        self.kind, self.name, self.where = kind, name, where

    def __str__(self) -> str:
        return f"{self.where} declares {self.kind} {self.name!r} twice; rename one of them"


class WindowError(DefinitionError):
    """A window, hop or duration can't be used."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what, fix)
        self.what, self.fix = what, fix

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


class ExpressionError(DefinitionError):
    """An expression can't be evaluated on its source, or gives the wrong type."""

    def __init__(self, expression: str, where: str, reason: str) -> None:
        super().__init__(expression, where, reason)
        self.expression, self.where, self.reason = expression, where, reason

    def __str__(self) -> str:
        return f"{self.where}: the expression {self.expression} doesn't fit: {self.reason}"


class InvalidDefinitionError(DefinitionError):
    """A declaration's argument is out of range or of the wrong kind."""

    def __init__(self, where: str, problem: str, fix: str) -> None:
        super().__init__(where, problem, fix)
        self.where, self.problem, self.fix = where, problem, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}; {self.fix}"


# ── Settings ────────────────────────────────────────────────────────────────────────


class SettingsError(HeliostatError):
    """A setting is malformed, out of range, or contradicts another."""

    exit_code = 2

    def __init__(self, where: str, problem: str, fix: str = "see configs/base.yaml for every setting") -> None:
        super().__init__(where, problem, fix)
        self.where, self.problem, self.fix = where, problem, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}; {self.fix}"


class UnknownSettingError(SettingsError):
    """A YAML key or environment variable names no setting."""

    def __init__(self, name: str, where: str, suggestions: tuple[str, ...]) -> None:
        super().__init__(where, f"{name!r} is no setting", f"did you mean: {_listed(suggestions)}?")
        self.args = (name, where, suggestions)
        self.name, self.suggestions = name, suggestions


# ── Data ────────────────────────────────────────────────────────────────────────────


class DataError(HeliostatError):
    """Rows, files or columns don't fit what was declared."""

    http_status = 422
    exit_code = 3


class MissingFileError(DataError):
    """A file or folder to read doesn't exist."""

    def __init__(
        self, path: str, hint: str = "check the path; relative paths start where the command was run"
    ) -> None:
        super().__init__(path, hint)
        self.path, self.hint = path, hint

    def __str__(self) -> str:
        return f"{self.path!r} doesn't exist; {self.hint}"


class SchemaMismatchError(DataError):
    """A table's columns don't fit the declared schema."""

    def __init__(self, what: str, problems: tuple[str, ...], expected: str) -> None:
        super().__init__(what, problems, expected)
        self.what, self.problems, self.expected = what, problems, expected

    def __str__(self) -> str:
        return f"{self.what} doesn't fit its schema: {'; '.join(self.problems)}. Expected: {self.expected}"


class KeyColumnError(DataError):
    """A frame lacks a key column, or a key is null or of the wrong type."""

    def __init__(self, column: str, what: str, problem: str, known: tuple[str, ...]) -> None:
        super().__init__(column, what, problem, known)
        self.column, self.what, self.problem, self.known = column, what, problem, known

    def __str__(self) -> str:
        return f"{self.what}: key column {self.column!r} {self.problem}; columns are: {_listed(self.known)}"


class InvalidValueError(DataError):
    """A value given by a user can't be read as what it should be."""

    def __init__(self, what: str, value: str, expected: str) -> None:
        super().__init__(what, value, expected)
        self.what, self.value, self.expected = what, value, expected

    def __str__(self) -> str:
        return f"{self.what}: {self.value!r} isn't usable; expected {self.expected}"


class UndefinedMetricError(DataError):
    """A metric was asked for on rows where it has no value."""

    def __init__(self, metric: str, reason: str, fix: str) -> None:
        super().__init__(metric, reason, fix)
        self.metric, self.reason, self.fix = metric, reason, fix

    def __str__(self) -> str:
        return f"{self.metric} isn't defined: {self.reason}; {self.fix}"


class ExperimentDataError(DataError):
    """An experiment's exposures, outcomes or plan can't be analysed."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix

    def __str__(self) -> str:
        return f"{self.problem}; {self.fix}"


class MonitoringDataError(DataError):
    """What a monitor was given can't be compared."""

    def __init__(self, check: str, problem: str, fix: str) -> None:
        super().__init__(check, problem, fix)
        self.check, self.problem, self.fix = check, problem, fix

    def __str__(self) -> str:
        return f"{self.check}: {self.problem}; {self.fix}"


# ── Requests ────────────────────────────────────────────────────────────────────────


class RequestError(HeliostatError):
    """A request can't be read."""

    http_status = 400
    exit_code = 3


class BodyTooLargeError(RequestError):
    """A request's body is larger than the limit."""

    http_status = 413

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.limit_bytes = limit_bytes

    def __str__(self) -> str:
        return (
            f"the body is larger than {self.limit_bytes} bytes; send fewer rows a request, "
            "or raise serving.max_body_bytes"
        )


# ── Not found ───────────────────────────────────────────────────────────────────────


class NotFoundError(HeliostatError):
    """The thing asked for doesn't exist."""

    http_status = 404
    exit_code = 4


class UnknownModelError(NotFoundError):
    """A model was named that isn't declared or has no version."""

    def __init__(self, model: str, known: tuple[str, ...]) -> None:
        super().__init__(model, known)
        self.model, self.known = model, known

    def __str__(self) -> str:
        return f"there is no model {self.model!r}; known are: {_listed(self.known)}"


class UnknownVersionError(NotFoundError):
    """A model version was named that doesn't exist."""

    def __init__(self, model: str, version: str, known: tuple[str, ...]) -> None:
        super().__init__(model, version, known)
        self.model, self.version, self.known = model, version, known

    def __str__(self) -> str:
        return f"model {self.model!r} has no version {self.version}; it has: {_listed(self.known)}"


class UnknownAliasError(NotFoundError):
    """An alias was named that points nowhere."""

    def __init__(self, model: str, alias: str, known: tuple[str, ...]) -> None:
        super().__init__(model, alias, known)
        self.model, self.alias, self.known = model, alias, known

    def __str__(self) -> str:
        return (
            f"model {self.model!r} has no alias {self.alias!r}; set are: {_listed(self.known)}. "
            f"Promote a version first: heliostat models promote {self.model} VERSION"
        )


# ── Conflicts ───────────────────────────────────────────────────────────────────────


class ConflictError(HeliostatError):
    """Somebody else was first, or a rule forbids it now."""

    http_status = 409
    exit_code = 5


# ── Storage ─────────────────────────────────────────────────────────────────────────


class StorageError(HeliostatError):
    """A store can't be reached, or what it holds can't be trusted."""

    http_status = 503
    exit_code = 6


class OnlineStoreUnavailableError(StorageError):
    """The online store doesn't answer."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return (
            f"the online store at {self.url} doesn't answer ({self.reason}); "
            "start it (`heliostat up` for the embedded one) or correct online.url"
        )


class CatalogUnavailableError(StorageError):
    """The catalog's database doesn't answer."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return f"the catalog at {self.url} can't be used ({self.reason}); start its server or correct catalog.url"


class EmbeddedServerError(StorageError):
    """The embedded server can't be started, found or stopped."""

    def __init__(self, where: str, problem: str, fix: str) -> None:
        super().__init__(where, problem, fix)
        self.where, self.problem, self.fix = where, problem, fix

    def __str__(self) -> str:
        return f"the embedded server in {self.where} can't be used: {self.problem}; {self.fix}"


class StorageNotSharedError(StorageError):
    """A cluster of several nodes was given storage that only one node can see."""

    def __init__(self, nodes: int, settings: tuple[str, ...]) -> None:
        super().__init__(nodes, settings)
        self.nodes, self.settings = nodes, settings

    def __str__(self) -> str:
        return (
            f"the Ray cluster has {self.nodes} nodes, but these settings name storage that only one of them "
            f"can see: {_listed(self.settings)}. Set storage.root to s3://… (or storage.shared: true for a "
            "mount that all nodes have), online.url to a Redis server and catalog.url to PostgreSQL"
        )
