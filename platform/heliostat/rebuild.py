"""Online state from what lasts: materialization of what is declared, and all of it after a server was lost.

What comes back: the rings of every declared view and version and the memory of recent events' ids,
from the event log; routes, from the catalog; cached batch predictions, from the offline store; the
streams' positions, from the tables. What doesn't: entries of streams that no table had yet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from heliostat import cluster
from heliostat.batch import restore_cache
from heliostat.clock import format_instant, parse_instant_us
from heliostat.errors import InvalidValueError
from heliostat.features.definitions import FeatureView
from heliostat.online.bucket_rings import RateLimit
from heliostat.online.materialize import (
    SMALL_MATERIALIZATION,
    SMALL_WITHOUT_RAY,
    Materialization,
    OnStep,
    Step,
    materialize,
)
from heliostat.online.tiles import RingLimits
from heliostat.storage.delta import StreamId
from heliostat.storage.online_store import OnlineConfig
from heliostat.storage.stream_tail import advance
from heliostat.workspace import Workspace


@dataclass(frozen=True)
class Rebuilt:
    """What was restored.

    Attributes:
        rings: What was materialized, for each source and entity.
        routes: Models whose route is published again.
        cached: Batch predictions that are cached again.
        streams: Streams that were moved behind what their tables have.
    """

    rings: tuple[Materialization, ...]
    routes: tuple[str, ...]
    cached: int
    streams: int

    def describe(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return {
            "rings": [each.describe() for each in self.rings],
            "routes": list(self.routes),
            "cached": self.cached,
            "streams": self.streams,
        }

    def __str__(self) -> str:
        lines = [
            *map(str, self.rings),
            f"routes: {', '.join(self.routes) or 'none'}",
            f"cached batch predictions: {self.cached:,}; streams moved on: {self.streams}",
            "events, predictions and labels that were only in the lost server's streams are gone: send them again",
        ]
        return "\n".join(lines)


def materialize_views(
    workspace: Workspace,
    views: Sequence[FeatureView] | None = None,
    *,
    as_of_us: int | None = None,
    full: bool = False,
    on_ray: bool = True,
    on_step: OnStep | None = None,
) -> tuple[Materialization, ...]:
    """Materialize declared views as the settings say.

    Args:
        workspace: Event log, online store, clock, settings and declarations.
        views: Which; None: all versions of all.
        as_of_us: An earlier instant; None: now.
        full: Look at all entities, also where nothing has changed.
        on_ray: What isn't small on Ray, which is joined, or started for that; False: all in this process.
        on_step: Told how far it is.

    Raises:
        StorageError: If the log can't be read or the store doesn't answer.
        MaterializationConflictError: If another materialization of the same began meanwhile.
    """
    settings = workspace.settings.materialization
    chosen = list(workspace.definitions.views.values()) if views is None else views
    with _joined(workspace, on_ray):
        for view in chosen:
            workspace.categories.catch_up(workspace.event_log, view)
        return materialize(
            chosen,
            event_log=workspace.event_log,
            online=OnlineConfig.of(workspace.settings),
            as_of_us=workspace.clock.now_us() if as_of_us is None else as_of_us,
            limits=RingLimits.of(workspace.settings.ingestion),
            present=as_of_us is None,
            full=full,
            full_every_us=settings.full_every_us,
            rate=RateLimit(settings.max_entities_per_s, settings.max_bytes_per_s),
            on_ray=on_ray,
            small=SMALL_MATERIALIZATION if cluster.is_given(workspace.settings) else SMALL_WITHOUT_RAY,
            connect=partial(cluster.connect, workspace.settings),
            on_step=on_step,
            gone=workspace.retired_views(),
        )


def _joined(workspace: Workspace, on_ray: bool) -> AbstractContextManager[None]:
    """Join a cluster that there is, first of all: it says if its machines don't share the storage.

    To start one takes ten seconds; that waits until Ray has something to do.
    """
    settings = workspace.settings
    return cluster.connect(settings) if on_ray and cluster.is_given(settings) else nullcontext()


def past_instant_us(workspace: Workspace, text: str | None) -> int | None:
    """The instant that a text names; None: now.

    Raises:
        InvalidValueError: If it is none, or in the future.
    """
    if text is None:
        return None
    instant_us, now_us = parse_instant_us(text), workspace.clock.now_us()
    if instant_us > now_us:
        raise InvalidValueError("--as-of", text, f"an instant up to now, {format_instant(now_us)}")
    return instant_us


def rebuild(workspace: Workspace, *, on_ray: bool = True, on_step: OnStep | None = None) -> Rebuilt:
    """Restore all online state, beside live ingestion if there is any.

    If it is interrupted, a materialization goes on with the buckets that are missing.

    Args:
        workspace: All stores, clock, settings and declarations.
        on_ray: As `materialize_views` takes it.
        on_step: Told how far it is.

    Raises:
        StorageError: If a store can't be reached.
        MaterializationConflictError: If another materialization of the same began meanwhile.
    """
    with _joined(workspace, on_ray):
        return _rebuilt(workspace, on_ray, on_step)


def _rebuilt(workspace: Workspace, on_ray: bool, on_step: OnStep | None) -> Rebuilt:
    online, views = workspace.online, list(workspace.definitions.views.values())
    moved = advance(online, _positions(workspace))
    routes = []
    for model in workspace.models.models():
        if workspace.rollout.current(model) is not None:
            workspace.rollout.publish(model)
            routes.append(model)
    # What buckets say of themselves isn't believed: each is looked at in full.
    online.remove([online.keys.bucket_state(view.ref, at) for view in views for at in workspace.event_log.buckets])
    rings = materialize_views(workspace, views, on_ray=on_ray, on_step=on_step)
    cached = sum(restore_cache(workspace, spec) for spec in workspace.definitions.models.values())
    return Rebuilt(rings, tuple(routes), cached, moved)


def _positions(workspace: Workspace) -> dict[str, StreamId]:
    """The last entry of each stream that a table has."""
    streams, found = workspace.streams, dict[str, StreamId]()

    def note(progress: dict[str, StreamId | None]) -> None:
        for stream, last in progress.items():
            if last is not None:
                found[stream] = max(last, found.get(stream, last))

    for source in workspace.definitions.sources.values():
        for entity in source.entities:
            note(workspace.event_log.progress(source, entity, streams.event_streams(source.name)))
    for name in ("predictions", "actuals"):
        for model in workspace.offline_store.tables(name):
            note(workspace.offline_store.progress(name, model, [streams.record_stream(name)]))
    return found


@contextmanager
def shown(stream: TextIO = sys.stderr) -> Iterator[Callable[[Step], None]]:
    """Shows how far a materialization is: a bar on a terminal, else a line for each tenth.

    Yields:
        What `materialize` tells.
    """
    if not stream.isatty():
        yield _Lines(stream)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("buckets, {task.fields[entities]:,} entities"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=stream)) as progress:
        tasks: dict[tuple[str, ...], Any] = {}

        def show(step: Step) -> None:
            if step.views not in tasks:
                tasks[step.views] = progress.add_task(", ".join(step.views), total=step.total, entities=0)
            progress.update(tasks[step.views], completed=step.done, entities=step.entities)

        yield show


@dataclass
class _Lines:
    """Plain lines, few of them."""

    stream: TextIO
    tenth: int = -1

    def __call__(self, step: Step) -> None:
        tenth = 10 * step.done // step.total if step.total else 10
        if step.done == 0:
            self.tenth = -1
        if tenth > self.tenth:
            self.tenth = tenth
            told = f"{step.done} of {step.total} buckets, {step.entities:,} entities"
            print(f"{', '.join(step.views)}: {told}", file=self.stream, flush=True)
