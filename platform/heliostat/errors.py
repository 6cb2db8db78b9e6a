"""Every error that Heliostat raises on purpose.

    HeliostatError
    ├── DefinitionError            a declaration contradicts itself or the registry
    │   ├── UnknownColumnError  UnknownFeatureError  UnknownViewError  UnknownSourceError
    │   ├── DuplicateNameError  WindowError  ExpressionError  DefinitionConflictError
    ├── SettingsError              a setting is unknown, malformed or contradicts another
    │   └── UnknownSettingError  MissingExtraError
    ├── DataError                  rows, files or columns that don't fit
    │   ├── MissingFileError  SchemaMismatchError  KeyColumnError  SpineError
    │   ├── ExperimentDataError  MonitoringDataError  SignatureMismatchError
    │   ├── TrainingDataError  UndefinedMetricError
    │   └── InvalidPackageError  InvalidRouteError
    ├── TrainingFailedError        a search or a fit broke down on the cluster
    ├── RequestError               a request that can't be read
    │   └── BodyTooLargeError  MalformedBodyError  InvalidFieldError  UnknownOverrideError
    │   └── MissingInputError
    ├── ServingError               the service can't answer now
    │   ├── OverloadedError  ShuttingDownError  DeadlineError
    │   ├── UnservableModelError  StaleVersionError  PredictionLogError  BatchResultError
    │   └── DeploymentFailedError
    ├── NotFoundError              the thing asked for doesn't exist
    │   └── UnknownModelError  UnknownVersionError  UnknownAliasError  UnknownEntityError
    ├── ConflictError              somebody else was first, or a rule forbids it
    │   ├── PromotionConflictError  GateFailedError  RollbackError  RolloutError  ViewInUseError
    │   └── CategoryCollisionError  HistoryNeededError  EntityBusyError  MaterializationConflictError
    ├── GatewayError               a client's request that a gateway refused, in the gateway's words
    │   └── GatewayUnreachableError
    └── StorageError               a store can't be reached, or can't be trusted
        ├── OnlineStoreUnavailableError  CatalogUnavailableError  StorageNotSharedError
        ├── RingCorruptError  KafkaUnavailableError
        └── CatalogSchemaError  ArtifactStoreError  ArtifactMissingError  ArtifactCorruptError

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


class DefinitionConflictError(DefinitionError):
    """A declaration says something else than what is registered under the same name and version."""

    def __init__(self, what: str, differences: tuple[str, ...], fix: str) -> None:
        super().__init__(what, differences, fix)
        self.what, self.differences, self.fix = what, differences, fix

    def __str__(self) -> str:
        return f"{self.what} is registered with another meaning: {'; '.join(self.differences)}. {self.fix}"


# ── Settings ────────────────────────────────────────────────────────────────────────


class SettingsError(HeliostatError):
    """A setting is malformed, out of range, or contradicts another."""

    exit_code = 2

    def __init__(self, where: str, problem: str, fix: str = "see configs/base.yaml for every setting") -> None:
        super().__init__(where, problem, fix)
        self.where, self.problem, self.fix = where, problem, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}; {self.fix}"


class MissingExtraError(SettingsError):
    """A setting asks for something that an optional package does."""

    def __init__(self, setting: str, package: str, extra: str) -> None:
        super().__init__(setting, package, extra)
        self.setting, self.package, self.extra = setting, package, extra

    def __str__(self) -> str:
        return f"{self.setting} needs the package {self.package}: pip install 'heliostat[{self.extra}]'"


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


class SignatureMismatchError(DataError):
    """A model was given other features than those it was trained on, or in another order."""

    def __init__(self, what: str, problems: tuple[str, ...], expected: tuple[str, ...]) -> None:
        super().__init__(what, problems, expected)
        self.what, self.problems, self.expected = what, problems, expected

    def __str__(self) -> str:
        return (
            f"{self.what} doesn't fit the signature: {'; '.join(self.problems)}. Expected: {_listed(self.expected)}"
        )


class InvalidPackageError(DataError):
    """A model's files can't be read, or contradict each other."""

    def __init__(self, part: str, problem: str) -> None:
        super().__init__(part, problem)
        self.part, self.problem = part, problem

    def __str__(self) -> str:
        return f"the model package's {self.part} can't be used: {self.problem}; package the model again"


class InvalidRouteError(DataError):
    """A routing document contradicts itself, or can't be read."""

    def __init__(self, model: str, problem: str, fix: str) -> None:
        super().__init__(model, problem, fix)
        self.model, self.problem, self.fix = model, problem, fix

    def __str__(self) -> str:
        return f"the route of model {self.model!r} can't be used: {self.problem}; {self.fix}"


class TrainingDataError(DataError):
    """A training set can't be built from what was asked for and what there is."""

    def __init__(self, model: str, problem: str, fix: str) -> None:
        super().__init__(model, problem, fix)
        self.model, self.problem, self.fix = model, problem, fix

    def __str__(self) -> str:
        return f"training of {self.model!r}: {self.problem}; {self.fix}"


class TrainingFailedError(HeliostatError):
    """A search or a fit broke down on the cluster."""

    def __init__(self, model: str, what: str, reason: str) -> None:
        super().__init__(model, what, reason)
        self.model, self.what, self.reason = model, what, reason

    def __str__(self) -> str:
        return f"training of {self.model!r}: {self.what} ({self.reason}); see Ray's logs of the workers"


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


class SpineError(DataError):
    """A spine lacks what a point-in-time join needs, or has what it would add."""

    def __init__(self, problem: str, fix: str, columns: tuple[str, ...], what: str = "the spine") -> None:
        super().__init__(problem, fix, columns, what)
        self.problem, self.fix, self.columns, self.what = problem, fix, columns, what

    def __str__(self) -> str:
        return f"{self.what} {self.problem}; {self.fix}. Its columns are: {_listed(self.columns)}"


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


# ── Serving ─────────────────────────────────────────────────────────────────────────


class TooManyEventsError(RequestError):
    """A request carries more events than it may."""

    http_status = 413

    def __init__(self, given: int, limit: int) -> None:
        super().__init__(given, limit)
        self.given, self.limit = given, limit

    def __str__(self) -> str:
        return (
            f"the request carries {self.given} events, and at most {self.limit} are taken at once; "
            "send several requests, or raise ingestion.max_events_per_request"
        )


class MalformedBodyError(RequestError):
    """A request's body can't be parsed at all."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the body is no JSON object ({self.reason}); send Content-Type: application/json and an object"


class InvalidFieldError(RequestError):
    """A field of a request has the wrong type, is missing, or isn't known."""

    http_status = 422

    def __init__(self, field: str, problem: str, expected: str) -> None:
        super().__init__(field, problem, expected)
        self.field, self.problem, self.expected = field, problem, expected

    def __str__(self) -> str:
        return f"{self.field} {self.problem}; expected {self.expected}"


class UnknownOverrideError(RequestError):
    """A request gives a feature that the model doesn't take."""

    http_status = 422

    def __init__(self, feature: str, model: str, known: tuple[str, ...]) -> None:
        super().__init__(feature, model, known)
        self.feature, self.model, self.known = feature, model, known

    def __str__(self) -> str:
        return f"model {self.model!r} takes no feature {self.feature!r}; it takes: {_listed(self.known)}"


class MissingInputError(RequestError):
    """Features need values that only the request has, and it hasn't given them."""

    http_status = 422

    def __init__(self, missing: tuple[str, ...], of: str, where: str) -> None:
        super().__init__(missing, of, where)
        self.missing, self.of, self.where = missing, of, where

    def __str__(self) -> str:
        names = ", ".join(map(repr, self.missing))
        example = ", ".join(f'"{name}": …' for name in self.missing)
        return f"{self.of} needs {names} of the request, and {self.where} has none; give {{{example}}}; null is fine"


class ServingError(HeliostatError):
    """The service can't answer now; the same request may succeed later."""

    http_status = 503
    exit_code = 6


class OverloadedError(ServingError):
    """More requests wait than are allowed to."""

    def __init__(self, waiting: int, limit: int) -> None:
        super().__init__(waiting, limit)
        self.waiting, self.limit = waiting, limit

    def __str__(self) -> str:
        return (
            f"{self.waiting} requests wait already, the limit is {self.limit}; "
            "try again later, or add replicas (serving.replicas)"
        )


class ShuttingDownError(ServingError):
    """The replica takes no new requests."""

    def __str__(self) -> str:
        return "this replica is shutting down; send the request again, another one takes it"


class DeadlineError(ServingError):
    """A request wasn't answered within its time."""

    http_status = 504

    def __init__(self, deadline_ms: float) -> None:
        super().__init__(deadline_ms)
        self.deadline_ms = deadline_ms

    def __str__(self) -> str:
        return f"no answer within {self.deadline_ms:.0f} ms; try again, or raise serving.deadline_ms"


class UnservableModelError(ServingError):
    """No version of a model can be loaded, and nothing is known to fall back on."""

    def __init__(self, model: str, version: int, reason: str) -> None:
        super().__init__(model, version, reason)
        self.model, self.version, self.reason = model, version, reason

    def __str__(self) -> str:
        return (
            f"version {self.version} of model {self.model!r} can't be served ({self.reason}) and no other is known; "
            f"see `heliostat models show {self.model}`, then roll back or train again"
        )


class StaleVersionError(ServingError):
    """A version was trained on features that are declared otherwise now."""

    def __init__(self, model: str, version: int, views: tuple[str, ...]) -> None:
        super().__init__(model, version, views)
        self.model, self.version, self.views = model, version, views

    def __str__(self) -> str:
        return (
            f"version {self.version} of model {self.model!r} was trained on other definitions of: "
            f"{_listed(self.views)}; train a new version, or restore the definitions that it was trained on"
        )


class PredictionLogError(ServingError):
    """Predictions couldn't be made durable, so they aren't given out."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"the prediction log can't be written ({self.reason}); repair the online store, "
            "or set serving.when_log_fails: answer to answer without it"
        )


class DeploymentFailedError(ServingError):
    """The inference graph doesn't come up."""

    def __init__(self, application: str, reason: str) -> None:
        super().__init__(application, reason)
        self.application, self.reason = application, reason

    def __str__(self) -> str:
        return f"application {self.application!r} doesn't come up: {self.reason}"


class BatchResultError(ServingError):
    """A batch call gave another number of results than it was given items."""

    http_status = 500

    def __init__(self, expected: int, given: int) -> None:
        super().__init__(expected, given)
        self.expected, self.given = expected, given

    def __str__(self) -> str:
        return f"a batch of {self.expected} items gave {self.given} results; the stage that was called is broken"


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


class UnknownEntityError(NotFoundError):
    """An entity was named that isn't declared."""

    def __init__(self, entity: str, known: tuple[str, ...]) -> None:
        super().__init__(entity, known)
        self.entity, self.known = entity, known

    def __str__(self) -> str:
        return f"there is no entity {self.entity!r}; declared are: {_listed(self.known)}"


class UnknownTableError(NotFoundError):
    """A table, or a part of one, was asked for that was never written."""

    def __init__(self, table: str, known: tuple[str, ...]) -> None:
        super().__init__(table, known)
        self.table, self.known = table, known

    def __str__(self) -> str:
        return f"the offline store has no {self.table}; it has: {_listed(self.known)}"


# ── Conflicts ───────────────────────────────────────────────────────────────────────


class ConflictError(HeliostatError):
    """Somebody else was first, or a rule forbids it now."""

    http_status = 409
    exit_code = 5


class PromotionConflictError(ConflictError):
    """An alias has moved since the caller looked at it."""

    def __init__(self, model: str, alias: str, expected: str, found: str) -> None:
        super().__init__(model, alias, expected, found)
        self.model, self.alias, self.expected, self.found = model, alias, expected, found

    def __str__(self) -> str:
        return (
            f"alias {self.alias!r} of model {self.model!r} was expected at {self.expected} but is at {self.found}: "
            f"somebody moved it. Look again (heliostat models show {self.model}) and repeat if it still holds"
        )


class CategoryCollisionError(ConflictError):
    """Two texts of one column have the same code: one of them would be taken for the other."""

    def __init__(self, column: str, text: str, other: str, code: int) -> None:
        super().__init__(column, text, other, code)
        self.column, self.text, self.other, self.code = column, text, other, code

    def __str__(self) -> str:
        return (
            f"{self.column}: {self.text!r} and {self.other!r} have the same code {self.code}; write one of them "
            "otherwise, or leave the column out of categorical features"
        )


class GateFailedError(ConflictError):
    """A version may not be promoted, since the gate didn't let it through."""

    def __init__(self, model: str, version: int, reasons: tuple[str, ...]) -> None:
        super().__init__(model, version, reasons)
        self.model, self.version, self.reasons = model, version, reasons

    def __str__(self) -> str:
        return (
            f"version {self.version} of model {self.model!r} hasn't passed its gate: {'; '.join(self.reasons)}. "
            "Train a better one, change the gate in the model's definition, or force it and give a reason"
        )


class ViewInUseError(ConflictError):
    """A version of a feature view would go that somebody who serves reads."""

    def __init__(self, view: str, readers: tuple[str, ...]) -> None:
        super().__init__(view, readers)
        self.view, self.readers = view, readers

    def __str__(self) -> str:
        return (
            f"feature view {self.view} can't go: {'; '.join(self.readers)} still reads it. Declare it beside the "
            "new version until a model that was trained on that one serves, then remove it"
        )


class RollbackError(ConflictError):
    """There is no earlier version that an alias could go back to."""

    def __init__(self, model: str, alias: str, version: int) -> None:
        super().__init__(model, alias, version)
        self.model, self.alias, self.version = model, alias, version

    def __str__(self) -> str:
        return (
            f"alias {self.alias!r} of model {self.model!r} has pointed at nothing before version {self.version}; "
            f"promote another one: heliostat models promote {self.model} VERSION"
        )


class RolloutError(ConflictError):
    """A step of a rollout doesn't follow from where it stands."""

    def __init__(self, model: str, step: str, state: str, fix: str) -> None:
        super().__init__(model, step, state, fix)
        self.model, self.step, self.state, self.fix = model, step, state, fix

    def __str__(self) -> str:
        return f"model {self.model!r} can't {self.step}: {self.state}; {self.fix}"


class MaterializationConflictError(ConflictError):
    """A bucket's rings are being materialized by somebody who began later."""

    def __init__(self, bucket: str) -> None:
        super().__init__(bucket)
        self.bucket = bucket

    def __str__(self) -> str:
        return (
            f"another materialization of {self.bucket} began meanwhile and goes on alone; "
            "wait for it to end, then run this one again if it is of other views"
        )


class StaleProgressError(ConflictError):
    """Somebody else has applied entries of the same stream meanwhile."""

    def __init__(self, stream: str, expected: str, found: str) -> None:
        super().__init__(stream, expected, found)
        self.stream, self.expected, self.found = stream, expected, found

    def __str__(self) -> str:
        return (
            f"stream {self.stream!r} is applied up to {self.found}, not {self.expected}: another sink was quicker; "
            "nothing was written, read the stream again from there"
        )


# ── Clients ─────────────────────────────────────────────────────────────────────────


class GatewayError(HeliostatError):
    """A gateway refused a request; the words are its own."""

    http_status = 502
    exit_code = 6

    def __init__(self, request: str, status: int, code: str, message: str, fix: str = "") -> None:
        super().__init__(request, status, code, message, fix)
        self.request, self.status, self.code, self.message, self.fix = request, status, code, message, fix

    def __str__(self) -> str:
        fix = f"; {self.fix}" if self.fix else ""
        return f"{self.request} was answered with {self.status} {self.code}: {self.message}{fix}"


class GatewayUnreachableError(GatewayError):
    """A gateway didn't answer, however often it was asked."""

    def __init__(self, request: str, url: str, tries: int, reason: str) -> None:
        HeliostatError.__init__(self, request, url, tries, reason)
        self.request, self.url, self.tries, self.reason = request, url, tries, reason
        self.status, self.code, self.message, self.fix = 0, "unreachable", reason, ""

    def __str__(self) -> str:
        return (
            f"{self.request} got no answer from {self.url} in {self.tries} tries ({self.reason}); look whether "
            "the gateway runs there (`heliostat up` starts one). Sending the same events again is safe"
        )


class HistoryNeededError(ConflictError):
    """Events can't be dropped, since a declared window or a training instant still needs them."""

    def __init__(self, source: str, before: str, needs: tuple[str, ...]) -> None:
        super().__init__(source, before, needs)
        self.source, self.before, self.needs = source, before, needs

    def __str__(self) -> str:
        return (
            f"events of {self.source!r} before {self.before} are still needed: {'; '.join(self.needs)}. "
            "Keep them longer (storage.retention), change these declarations, or force it: "
            "then such values can't be computed again"
        )


class EntityBusyError(ConflictError):
    """An entity can't be forgotten, since events about it keep coming."""

    def __init__(self, entity: str, passes: int) -> None:
        super().__init__(entity, passes)
        self.entity, self.passes = entity, passes

    def __str__(self) -> str:
        return (
            f"events about this {self.entity} came in during each of {self.passes} passes; what came before is gone. "
            "Stop whoever sends them, then run this again"
        )


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


class RingCorruptError(StorageError):
    """What the online store holds under a ring's key isn't such a ring."""

    def __init__(self, view: str, group: str, found_bytes: tuple[int, ...], expected_bytes: int) -> None:
        super().__init__(view, group, found_bytes, expected_bytes)
        self.view, self.group, self.found_bytes, self.expected_bytes = view, group, found_bytes, expected_bytes

    def __str__(self) -> str:
        return (
            f"rings {self.group!r} of view {self.view!r} have {self.found_bytes} bytes in the online store, "
            f"not {self.expected_bytes}; something else wrote them: delete these keys and run "
            "jobs/materialize_features.py"
        )


class CatalogUnavailableError(StorageError):
    """The catalog's database doesn't answer."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return f"the catalog at {self.url} can't be used ({self.reason}); start its server or correct catalog.url"


class CatalogSchemaError(StorageError):
    """The catalog's tables were made by another release."""

    def __init__(self, url: str, found: int, expected: int) -> None:
        super().__init__(url, found, expected)
        self.url, self.found, self.expected = url, found, expected

    def __str__(self) -> str:
        return (
            f"the catalog at {self.url} has tables of version {self.found}, this release reads {self.expected}; "
            "use the release that made it, or set catalog.url to another database"
        )


class ArtifactStoreError(StorageError):
    """The artifact store can't be read or written."""

    def __init__(self, root: str, reason: str) -> None:
        super().__init__(root, reason)
        self.root, self.reason = root, reason

    def __str__(self) -> str:
        return f"the artifact store at {self.root} can't be used: {self.reason}; correct storage.root or its options"


class ArtifactMissingError(StorageError):
    """An artifact isn't in the store."""

    def __init__(self, digest: str, root: str) -> None:
        super().__init__(digest, root)
        self.digest, self.root = digest, root

    def __str__(self) -> str:
        return (
            f"there is no artifact {self.digest!r} in {self.root}; "
            "check that the storage settings are those it was stored with, or train again"
        )


class ArtifactCorruptError(StorageError):
    """An artifact's bytes aren't those that were stored."""

    def __init__(self, digest: str, root: str, problem: str) -> None:
        super().__init__(digest, root, problem)
        self.digest, self.root, self.problem = digest, root, problem

    def __str__(self) -> str:
        return (
            f"artifact {self.digest} in {self.root} can't be trusted: {self.problem}; "
            "roll back to another version, then restore it from a backup or train again"
        )


class EmbeddedServerError(StorageError):
    """The embedded server can't be started, found or stopped."""

    def __init__(self, where: str, problem: str, fix: str) -> None:
        super().__init__(where, problem, fix)
        self.where, self.problem, self.fix = where, problem, fix

    def __str__(self) -> str:
        return f"the embedded server in {self.where} can't be used: {self.problem}; {self.fix}"


class TableUnavailableError(StorageError):
    """A Delta table can't be reached, or what is there is no Delta table."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(uri, reason)
        self.uri, self.reason = uri, reason

    def __str__(self) -> str:
        return f"the table {self.uri} can't be read: {self.reason}; check storage.root and storage.options"


class TableCommitError(StorageError):
    """A Delta table refuses a commit."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(uri, reason)
        self.uri, self.reason = uri, reason

    def __str__(self) -> str:
        return (
            f"nothing was written to the table {self.uri}: {self.reason}; "
            "check that it may be written to (storage.root, storage.options), then run this again"
        )


class BucketCountError(StorageError):
    """The event log was created with another number of buckets than the settings say."""

    exit_code = 2

    def __init__(self, uri: str, created_with: int, asked_for: int) -> None:
        super().__init__(uri, created_with, asked_for)
        self.uri, self.created_with, self.asked_for = uri, created_with, asked_for

    def __str__(self) -> str:
        return (
            f"the event log {self.uri} was created with {self.created_with} buckets and can't be used with "
            f"{self.asked_for}; set storage.buckets to {self.created_with}, or ingest again into a new storage.root"
        )


class ServingUnavailableError(StorageError):
    """The inference graph doesn't answer, or refuses."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return f"the inference graph at {self.url} gave no prediction ({self.reason}); start it with `heliostat up`"


class StreamEntryError(StorageError):
    """An entry of a stream can't be read."""

    def __init__(self, stream: str, reason: str) -> None:
        super().__init__(stream, reason)
        self.stream, self.reason = stream, reason

    def __str__(self) -> str:
        return (
            f"an entry of stream {self.stream!r} can't be read: {self.reason}; "
            "it was written by another program or by definitions that have changed since"
        )


class KafkaUnavailableError(StorageError):
    """Kafka's brokers can't be read from."""

    def __init__(self, brokers: str, reason: str) -> None:
        super().__init__(brokers, reason)
        self.brokers, self.reason = brokers, reason

    def __str__(self) -> str:
        return f"no events can be read from Kafka at {self.brokers}: {self.reason}; see the setting ingestion.kafka"


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
