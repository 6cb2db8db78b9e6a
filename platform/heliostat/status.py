"""What runs, what is registered, and how fresh the online store is."""

from __future__ import annotations

import os
from typing import Any

import httpx
import orjson

from heliostat import cluster
from heliostat.clock import format_instant
from heliostat.errors import OnlineStoreUnavailableError
from heliostat.settings import Settings
from heliostat.storage.embedded import EmbeddedServer
from heliostat.storage.late_events import late_events
from heliostat.storage.online_store import OnlineConfig, OnlineStore
from heliostat.workspace import Workspace

_HTTP_TIMEOUT_S = 2.0


def status_of(workspace: Workspace) -> dict[str, Any]:
    """A JSON document; nothing is started for it.

    Args:
        workspace: The project's.
    """
    settings = workspace.configured
    url = settings.online.url or EmbeddedServer.running(settings.home)
    return {
        "project": settings.project,
        "home": str(settings.home),
        "now": format_instant(workspace.clock.now_us()),
        "online_store": None if url is None else _online(workspace, url).shown_url,
        "ray": os.environ.get("RAY_ADDRESS") or cluster.head_address(settings.home),
        "job_api": cluster.jobs_address(settings.home),
        "serving": _ready(settings),
        "views": sorted({info.view for info in workspace.features.features()}),
        "materialized": {} if url is None else _materialized(workspace, _online(workspace, url)),
        "late_events": {} if url is None else _late(_online(workspace, url)),
        "models": {
            name: {version.version: list(version.aliases) for version in workspace.models.list(name)}
            for name in workspace.models.models()
        },
    }


def _online(workspace: Workspace, url: str) -> OnlineConfig:
    settings = workspace.configured
    online = settings.online.model_copy(update={"url": url})
    return OnlineConfig.of(settings.model_copy(update={"online": online}))


def _late(config: OnlineConfig) -> dict[str, Any]:
    """Events that came too late for a ring, by source, since the online store's data began."""
    try:
        with OnlineStore(config) as store:
            return dict(late_events(store))
    except OnlineStoreUnavailableError:
        return {}


def _materialized(workspace: Workspace, config: OnlineConfig) -> dict[str, Any]:
    """The last materialization of each declared view: instant, log version, rings and duration."""
    refs = [view.ref for view in workspace.definitions.views.values()]
    try:
        with OnlineStore(config) as store:
            found = store.read([store.keys.materialized(ref) for ref in refs])
    except OnlineStoreUnavailableError as error:
        return dict.fromkeys(refs, str(error))
    return {
        ref: None if document is None else _shortened(orjson.loads(document))
        for ref, document in zip(refs, found, strict=True)
    }


def _shortened(document: dict[str, Any]) -> dict[str, Any]:
    names = ("as_of", "log_version", "events", "entities", "rings_written", "rings_unchanged", "seconds")
    return {name: document.get(name) for name in names}


def serving_url(settings: Settings) -> str:
    """Where the inference graph answers, or would."""
    host = "127.0.0.1" if settings.serving.host == "0.0.0.0" else settings.serving.host  # noqa: S104 - compared
    return f"http://{host}:{settings.serving.port}"


def _ready(settings: Settings) -> str | None:
    try:
        answer = httpx.get(f"{serving_url(settings)}/readyz", timeout=_HTTP_TIMEOUT_S)
    except httpx.HTTPError:
        return None
    return f"{serving_url(settings)} ({'ready' if answer.is_success else 'not ready'})"
