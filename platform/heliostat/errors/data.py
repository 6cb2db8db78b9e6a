"""Rows, files, columns, and what is learned from them, that don't fit."""

from __future__ import annotations

from heliostat.errors.base import HeliostatError, listed


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

    @property
    def public_text(self) -> str:
        """Without the path."""
        return "a file that this needs is missing; the service's log says which"

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
        return f"{self.what}: key column {self.column!r} {self.problem}; columns are: {listed(self.known)}"


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
        return f"{self.what} doesn't fit the signature: {'; '.join(self.problems)}. Expected: {listed(self.expected)}"


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
        return f"{self.what} {self.problem}; {self.fix}. Its columns are: {listed(self.columns)}"
