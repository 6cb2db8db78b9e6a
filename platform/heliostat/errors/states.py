"""What doesn't exist, and what somebody else or a rule forbids now."""

from __future__ import annotations

from heliostat.errors.base import HeliostatError, listed


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
        return f"there is no model {self.model!r}; known are: {listed(self.known)}"


class UnknownVersionError(NotFoundError):
    """A model version was named that doesn't exist."""

    def __init__(self, model: str, version: str, known: tuple[str, ...]) -> None:
        super().__init__(model, version, known)
        self.model, self.version, self.known = model, version, known

    def __str__(self) -> str:
        return f"model {self.model!r} has no version {self.version}; it has: {listed(self.known)}"


class UnknownAliasError(NotFoundError):
    """An alias was named that points nowhere."""

    def __init__(self, model: str, alias: str, known: tuple[str, ...]) -> None:
        super().__init__(model, alias, known)
        self.model, self.alias, self.known = model, alias, known

    def __str__(self) -> str:
        return (
            f"model {self.model!r} has no alias {self.alias!r}; set are: {listed(self.known)}. "
            f"Promote a version first: heliostat models promote {self.model} VERSION"
        )


class UnknownEntityError(NotFoundError):
    """An entity was named that isn't declared."""

    def __init__(self, entity: str, known: tuple[str, ...]) -> None:
        super().__init__(entity, known)
        self.entity, self.known = entity, known

    def __str__(self) -> str:
        return f"there is no entity {self.entity!r}; declared are: {listed(self.known)}"


class UnknownTableError(NotFoundError):
    """A table, or a part of one, was asked for that was never written."""

    def __init__(self, table: str, known: tuple[str, ...]) -> None:
        super().__init__(table, known)
        self.table, self.known = table, known

    def __str__(self) -> str:
        return f"the offline store has no {self.table}; it has: {listed(self.known)}"


class UnknownPredictionError(NotFoundError):
    """A prediction was asked for that isn't in the log."""

    def __init__(self, prediction_id: str, models: tuple[str, ...]) -> None:
        super().__init__(prediction_id, models)
        self.prediction_id, self.models = prediction_id, models

    def __str__(self) -> str:
        return (
            f"no prediction {self.prediction_id!r} waits in the stream or is in the tables of {listed(self.models)}; "
            "take the `prediction_id` of an answer that says `logged`"
        )


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
