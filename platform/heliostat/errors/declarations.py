"""Declarations and settings that can't be used."""

from __future__ import annotations

from heliostat.errors.base import HeliostatError, listed


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
        return f"{self.where} names column {self.column!r}, which doesn't exist; there are: {listed(self.known)}"


class UnknownFeatureError(DefinitionError):
    """A vector was asked for a feature that its view doesn't define."""

    def __init__(self, feature: str, view: str, known: tuple[str, ...]) -> None:
        super().__init__(feature, view, known)
        self.feature, self.view, self.known = feature, view, known

    def __str__(self) -> str:
        return f"feature view {self.view!r} has no feature {self.feature!r}; it defines: {listed(self.known)}"


class UnknownViewError(DefinitionError):
    """A feature view was named that isn't declared."""

    http_status = 404
    exit_code = 4

    def __init__(self, view: str, known: tuple[str, ...]) -> None:
        super().__init__(view, known)
        self.view, self.known = view, known

    def __str__(self) -> str:
        return f"there is no feature view {self.view!r}; declared are: {listed(self.known)}"


class UnknownSourceError(DefinitionError):
    """An event source was named that isn't declared."""

    http_status = 404
    exit_code = 4

    def __init__(self, source: str, known: tuple[str, ...]) -> None:
        super().__init__(source, known)
        self.source, self.known = source, known

    def __str__(self) -> str:
        return f"there is no event source {self.source!r}; declared are: {listed(self.known)}"


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
        super().__init__(where, f"{name!r} is no setting", f"did you mean: {listed(suggestions)}?")
        self.args = (name, where, suggestions)
        self.name, self.suggestions = name, suggestions
