"""Access control as a wrapper around the whole ASGI application, in every replica.

It is in the replica, and not at the ingress, since a replica has a port of its own: where the ingress
listens beyond loopback, so do replicas, and whoever asks them directly passes no ingress.

Every route needs one scope, named in `ROUTES`; a route that isn't there keeps the application from
being built. Paths that no route serves need a key as well, any one, so that nobody can map out the
rest without. What is left for routes: `heliostat.serving.access.caller_of`.
"""

from __future__ import annotations

import copy
import functools
import ipaddress
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.http import answer_to, as_protocol_has_it, header_of, path_of
from heliostat.errors import (
    AccessError,
    ForcedVariantError,
    InvalidKeyError,
    MissingKeyError,
    MissingScopeError,
    NotLocalError,
)
from heliostat.serving import access
from heliostat.serving.access import CALLER, LOCAL, NOBODY, Caller, KeyRing, is_loopback
from heliostat.serving.telemetry import Meter

ROUTES: Final[dict[str, access.Scope | None]] = {
    "POST /predict": access.Scope.PREDICT,
    "POST /models/{model}/predict": access.Scope.PREDICT,
    "POST /events": access.Scope.INGEST,
    "POST /actuals": access.Scope.INGEST,
    "GET /features": access.Scope.READ,
    "GET /features/{view}/{entity:path}": access.Scope.READ,
    "GET /models": access.Scope.READ,
    "GET /models/{model}/{version}": access.Scope.READ,
    "GET /v2": access.Scope.READ,
    "GET /v2/models/{name}": access.Scope.READ,
    "GET /v2/models/{name}/versions/{version}": access.Scope.READ,
    # Stock clients look before they ask.
    "GET /v2/models/{name}/ready": access.Scope.PREDICT,
    "GET /v2/models/{name}/versions/{version}/ready": access.Scope.PREDICT,
    "POST /v2/models/{name}/infer": access.Scope.PREDICT,
    "POST /v2/models/{name}/versions/{version}/infer": access.Scope.PREDICT,
    # Probes have no keys. What is wrong, /readyz tells only those who may read.
    "GET /healthz": None,
    "GET /readyz": None,
    "GET /v2/health/live": None,
    "GET /v2/health/ready": None,
    # They name models, features and columns.
    "GET /docs": access.Scope.READ,
    "GET /docs/oauth2-redirect": access.Scope.READ,
    "GET /redoc": access.Scope.READ,
    "GET /openapi.json": access.Scope.READ,
}
"""The scope that each route needs, by method and path; None: open to everybody."""

_VARIANT_HEADER: Final = b"x-heliostat-variant"
_REALM: Final = 'Bearer realm="heliostat"'
_POLICY_VIOLATION: Final = 1008


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a route needs.

    Attributes:
        path: As it was declared; for the meter.
        needed: A scope; None: any valid key.
        open: Whether nothing is needed.
    """

    path: str
    needed: access.Scope | None
    open: bool = False


_UNKNOWN: Final = _Rule("(unknown)", None)


def forced_variant(scope: Scope) -> str | None:
    """The variant that a request forces, for tests of a split; None: as assigned.

    Raises:
        ForcedVariantError: If whoever sent it may not.
    """
    found = header_of(scope, _VARIANT_HEADER)
    if found is None:
        return None
    if not access.caller_of(scope).may(access.Scope.ADMIN):
        raise ForcedVariantError("X-Heliostat-Variant")
    return found.decode("latin-1")


class AccessControl:
    """The ASGI application behind access control.

    Args:
        app: Answers what is allowed.
        routes: All that it serves.
        keys: Knows the API keys; None: there are none, and only this machine's own requests are answered.
        meter: Counts what is refused; the application counts the rest.

    Attributes:
        routes: All that it serves.

    Raises:
        RuntimeError: If a route isn't in `ROUTES`.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[Any], keys: KeyRing | None, meter: Meter) -> None:
        self._app, self._keys, self._meter = app, keys, meter
        self.routes = tuple(map(_quick, routes))
        self._exact, self._patterns = _rules(self.routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request if it is allowed; refuse it otherwise, without a look at its body."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":  # there are none
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
                return
            await self._app(scope, receive, send)
            return
        keys, rule = self._keys, self._rule(scope)
        try:
            if keys is None:
                _check_local(scope)
                scope[CALLER] = LOCAL
            else:
                presented = _presented(scope)
                if presented is not None and not keys.settled():
                    await keys.settle()
                scope[CALLER] = _admit(keys, presented, rule)
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing is let through
            if not rule.open:
                await self._refuse(error, rule, scope, receive, send)
                return
            scope[CALLER] = NOBODY
        await self._app(scope, receive, send)

    def _rule(self, scope: Scope) -> _Rule:
        path, method = path_of(scope), scope["method"]
        rule = self._exact.get((method, path))
        if rule is not None:
            return rule
        for pattern, each in self._patterns.get(method, ()):
            if pattern.match(path):
                return each
        return _UNKNOWN

    async def _refuse(self, error: Exception, rule: _Rule, scope: Scope, receive: Receive, send: Send) -> None:
        begin = time.perf_counter()
        response = as_protocol_has_it(path_of(scope), answer_to(error))
        if isinstance(error, MissingScopeError):
            response.headers["WWW-Authenticate"] = f'{_REALM}, error="insufficient_scope", scope="{error.needed}"'
        elif isinstance(error, InvalidKeyError):
            response.headers["WWW-Authenticate"] = f'{_REALM}, error="invalid_token"'
        elif isinstance(error, AccessError) and error.http_status == 401:
            response.headers["WWW-Authenticate"] = _REALM
        await response(scope, receive, send)
        self._meter.answered(rule.path, response.status_code, (time.perf_counter() - begin) * 1e3)


def _quick(route: Any) -> Any:  # noqa: ANN401 - of Starlette or FastAPI
    """A route that knows at once whether it is meant by its own path: Serve asks so, of each request, to name it."""
    if not getattr(route, "methods", None) or "{" in route.path:
        return route
    plain, quick = route.matches, copy.copy(route)

    def matches(scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and scope["method"] in quick.methods and path_of(scope) == quick.path:
            return Match.FULL, {}
        found: tuple[Match, Scope] = plain(scope)
        return found

    quick.matches = matches
    return quick


def _rules(
    routes: Iterable[Any],
) -> tuple[dict[tuple[str, str], _Rule], dict[str, list[tuple[re.Pattern[str], _Rule]]]]:
    """What the routes need: by method and path, and by method and the application's own patterns in its order."""
    patterns: dict[str, list[tuple[re.Pattern[str], _Rule]]] = {}
    for route in routes:
        methods = getattr(route, "methods", None)
        if not methods:
            raise RuntimeError(f"{route!r} is no plain route: deployments/access.py can't tell what it needs")
        for method in methods:
            declared = f"{'GET' if method == 'HEAD' else method} {route.path}"
            if declared not in ROUTES:
                raise RuntimeError(f"route {declared!r} has no scope: name one in ROUTES of deployments/access.py")
            needed = ROUTES[declared]
            rule = _Rule(route.path, needed, open=needed is None)
            patterns.setdefault(method, []).append((route.path_regex, rule))
    exact: dict[tuple[str, str], _Rule] = {}
    for method, known in patterns.items():
        for path in (rule.path for _, rule in known if "{" not in rule.path):
            # The first that fits is the one that the application takes.
            exact[method, path] = next(rule for pattern, rule in known if pattern.match(path))
    return exact, patterns


def _presented(scope: Scope) -> bytes | None:
    """The key that a request carries."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            if value[:7].lower() == b"bearer ":
                return value[7:].strip() or None
        elif name == b"x-api-key":
            return value.strip() or None
    return None


def _admit(keys: KeyRing, presented: bytes | None, rule: _Rule) -> Caller:
    if presented is None:
        if rule.open:
            return NOBODY
        raise MissingKeyError
    caller = keys.caller(presented)
    if rule.needed is not None and rule.needed not in caller.scopes:
        raise MissingScopeError(rule.needed)
    return caller


# ── Without keys ────────────────────────────────────────────────────────────────────


def _check_local(scope: Scope) -> None:
    """Refuse what the machine's own programs don't send.

    The peer's address alone isn't enough: a page in this machine's browser may send requests to loopback as
    well, under its own name (told by ``Origin``) or under one that it made resolve to loopback (told by ``Host``).
    """
    peer = scope.get("client")
    if peer is None or not is_loopback(peer[0]):
        raise NotLocalError("this one comes from another")
    for name, value in scope["headers"]:
        if name == b"host":
            if not _is_fixed_name(value):
                raise NotLocalError("this one's Host header names another")
        elif name == b"origin" and not _is_local_origin(value):
            raise NotLocalError("this one was sent by another site's page")


@functools.lru_cache(maxsize=256)
def _is_fixed_name(host: bytes) -> bool:
    """Whether nobody else can make a name lead here: an address, ``localhost``, or a name without a domain."""
    name = _host_of(b"//" + host)
    if "." not in name or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@functools.lru_cache(maxsize=256)
def _is_local_origin(origin: bytes) -> bool:
    name = _host_of(origin)
    return name.endswith(".localhost") or is_loopback(name)


def _host_of(url: bytes) -> str:
    try:
        return urlsplit(url.decode("latin-1")).hostname or "."
    except ValueError:
        return "."
