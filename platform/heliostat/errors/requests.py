"""Requests that can't be read, answers that can't be given, and what a client hears of it."""

from __future__ import annotations

from heliostat.errors.base import HeliostatError, listed


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


class SlowBodyError(RequestError):
    """A request's body didn't arrive in time."""

    http_status = 408

    def __init__(self, limit_s: float) -> None:
        super().__init__(limit_s)
        self.limit_s = limit_s

    def __str__(self) -> str:
        return (
            f"the body didn't arrive within {self.limit_s:g} s; send it at once, or in smaller requests, "
            "or raise serving.body_timeout_s"
        )


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
        return f"model {self.model!r} takes no feature {self.feature!r}; it takes: {listed(self.known)}"


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


class VersionNotServingError(RequestError):
    """A version was asked for by its number, and it isn't the one that answers everybody."""

    http_status = 409

    def __init__(self, model: str, version: str, serving: tuple[str, ...]) -> None:
        super().__init__(model, version, serving)
        self.model, self.version, self.serving = model, version, serving

    def __str__(self) -> str:
        return (
            f"version {self.version} of model {self.model!r} doesn't answer everybody; "
            f"serving: {listed(self.serving)}. Ask without a version, or make it serve alone"
        )


class UnknownVariantError(RequestError):
    """A request forces a variant that the model's route doesn't have."""

    http_status = 422

    def __init__(self, variant: str, model: str, known: tuple[str, ...]) -> None:
        super().__init__(variant, model, known)
        self.variant, self.model, self.known = variant, model, known

    def __str__(self) -> str:
        return f"model {self.model!r} has no variant {self.variant!r} now; it has: {listed(self.known)}"


class ForcedVariantError(RequestError):
    """A request forces a variant, and whoever sent it may not."""

    http_status = 403

    def __init__(self, header: str) -> None:
        super().__init__(header)
        self.header = header

    def __str__(self) -> str:
        return f"header {self.header} needs an API key with scope admin; leave it out to get the assigned variant"


class ServingError(HeliostatError):
    """The service can't answer now; the same request may succeed later."""

    http_status = 503
    exit_code = 6

    @property
    def public_text(self) -> str:
        """All of it, except where a reason comes from the inside."""
        return str(self)


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

    @property
    def public_text(self) -> str:
        """Without the reason."""
        return f"version {self.version} of model {self.model!r} can't be served, and no other is known"

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
            f"{listed(self.views)}; train a new version, or restore the definitions that it was trained on"
        )


class DependencyOpenError(ServingError):
    """Something failed several times in a row, and isn't asked again for a while."""

    def __init__(self, dependency: str, retry_in_s: float, reason: str) -> None:
        super().__init__(dependency, retry_in_s, reason)
        self.dependency, self.retry_in_s, self.reason = dependency, retry_in_s, reason

    @property
    def public_text(self) -> str:
        """Without the reason."""
        return f"{self.dependency} failed and isn't asked again for {self.retry_in_s:g} s"

    def __str__(self) -> str:
        return f"{self.dependency} failed ({self.reason}) and isn't asked again for {self.retry_in_s:g} s"


class DegradedAnswerError(ServingError):
    """Only a fallback could answer, and the client wants none."""

    def __init__(self, model: str, fallback: str, dependency: str, reason: str) -> None:
        super().__init__(model, fallback, dependency, reason)
        self.model, self.fallback, self.dependency, self.reason = model, fallback, dependency, reason

    @property
    def public_text(self) -> str:
        """Without the reason."""
        return self._told("")

    def __str__(self) -> str:
        return self._told(f" ({self.reason})" if self.reason else "")

    def _told(self, why: str) -> str:
        return (
            f"{self.dependency} doesn't answer{why}: model {self.model!r} could only be answered by the fallback "
            f'{self.fallback}, and the request says "on_fallback": "error"; try again, or take the fallback'
        )


class HungModelError(ServingError):
    """A model's calls don't come back."""

    def __init__(self, model: str, calls: int) -> None:
        super().__init__(model, calls)
        self.model, self.calls = model, calls

    def __str__(self) -> str:
        return (
            f"{self.calls} calls of {self.model} hang; roll back to a version that answers, and restart the replica"
        )


class ModelTooLargeError(ServingError):
    """A version needs more memory than all models together may take."""

    def __init__(self, model: str, version: int, needed_bytes: int, limit_bytes: int) -> None:
        super().__init__(model, version, needed_bytes, limit_bytes)
        self.model, self.version, self.needed_bytes, self.limit_bytes = model, version, needed_bytes, limit_bytes

    def __str__(self) -> str:
        return (
            f"version {self.version} of model {self.model!r} needs about {self.needed_bytes:,} bytes, and all models "
            f"of a replica may take {self.limit_bytes:,}; raise serving.model_memory_bytes, or train a smaller one"
        )


class PredictionLogError(ServingError):
    """Predictions couldn't be made durable, so they aren't given out."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @property
    def public_text(self) -> str:
        """Without the reason."""
        return "the prediction log can't be written, and predictions aren't given out without it; try again"

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

    @property
    def public_text(self) -> str:
        """Without the reason."""
        return f"application {self.application!r} doesn't come up"

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
