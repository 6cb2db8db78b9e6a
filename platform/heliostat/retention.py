"""How long events are kept: whole days leave the log by event time, unless somebody still needs them.

What a declaration can look back at decides: a view's windows as of now and as of the oldest
prediction that monitors look at, a model's training instants, and a population that counts
everybody who ever came. A lifetime feature needs everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.clock import US_PER_DAY, US_PER_HOUR, format_instant, parse_duration_us, parse_instant_us
from heliostat.errors import HistoryNeededError, SettingsError
from heliostat.features.definitions import EventSource
from heliostat.features.offline import earliest_us
from heliostat.models.rows import model_sources
from heliostat.schema import TIMESTAMP, times_us
from heliostat.storage.erasure import Doomed, Erased, doomed_rows, erase_rows, vacuum
from heliostat.workspace import Workspace

PRUNE_KIND: Final = "prune"
"""How a prune is filed among the catalog's runs."""


@dataclass(frozen=True, slots=True)
class Need:
    """Somebody who looks back.

    Attributes:
        who: What, as a sentence's beginning.
        since_us: The first instant that it can see; None: all of the past.
    """

    who: str
    since_us: int | None

    def __str__(self) -> str:
        return f"{self.who} needs {'all of them' if self.since_us is None else f'those since {self.since_day}'}"

    @property
    def since_day(self) -> str:
        """The day of ``since_us``."""
        return format_instant((self.since_us or 0) // US_PER_DAY * US_PER_DAY)[:10]


@dataclass(frozen=True)
class PruneReport:
    """What a prune did, or would do.

    Attributes:
        before_us: Events before this instant go; the beginning of a day.
        rows: How many, by source: of the table that holds most of them.
        files: Files written anew or taken out.
        vacuumed: Old files that were deleted.
        overruled: Who still needed them and was overruled.
        dry_run: Whether nothing was done.
    """

    before_us: int
    rows: Mapping[str, int]
    files: int
    vacuumed: int
    overruled: tuple[str, ...]
    dry_run: bool

    def to_document(self) -> dict[str, Any]:
        """As JSON can carry it."""
        document = {**asdict(self), "before": format_instant(self.before_us), "overruled": list(self.overruled)}
        del document["before_us"]
        return document

    def lines(self) -> list[str]:
        """A report for people."""
        done = "would go" if self.dry_run else "gone"
        lines = [
            f"{source}: {rows:,} events before {format_instant(self.before_us)[:10]} {done}"
            for source, rows in self.rows.items()
        ]
        lines += [f"overruled: {each}" for each in self.overruled]
        if not self.dry_run:
            lines.append(f"{self.files} files written anew, {self.vacuumed} old ones deleted")
        return lines


def prune(
    workspace: Workspace, *, keep_us: int | None = None, force: bool = False, dry_run: bool = False
) -> PruneReport:
    """Drop old days of the declared sources from the event log. Safe to repeat, and beside ingestion.

    An old event that comes in later is kept until the next time. Predictions, snapshots and batch results
    stay. Online rings aren't touched.

    Args:
        workspace: The log, the declarations, the settings.
        keep_us: How far back events are kept, microseconds; None: as ``storage.retention`` says.
        force: Also what is still needed.
        dry_run: Only count.

    Raises:
        SettingsError: If nothing says how long events are kept.
        HistoryNeededError: If a declaration needs older events; nothing has changed then.
    """
    now_us, storage = workspace.clock.now_us(), workspace.configured.storage
    if keep_us is None:
        if storage.retention is None:
            raise SettingsError("storage.retention", "it isn't set", "set it, or say how long: --keep 400d")
        keep_us = parse_duration_us(storage.retention)
    before_us = (now_us - keep_us) // US_PER_DAY * US_PER_DAY
    sources = workspace.definitions.sources.values()
    overruled = [
        f"{source.name}: {need}"
        for source in sources
        for need in needs(workspace, source)
        if need.since_us is None or need.since_us < before_us
    ]
    if overruled and not force and not dry_run:
        of = overruled[0].partition(":")[0]
        told = tuple(each.removeprefix(f"{of}: ") for each in overruled if each.startswith(f"{of}: "))
        raise HistoryNeededError(of, format_instant(before_us)[:10], told)
    counts: dict[str, int] = {}
    done, vacuumed = Erased(), 0
    hours = 0 if storage.vacuum_after is None else -(-parse_duration_us(storage.vacuum_after) // US_PER_HOUR)
    for source in sources:
        doomed = _before(source, before_us)
        for entity in source.entities:
            place = workspace.event_log.table(source, entity)
            if dry_run:
                erased = Erased(sum(part.num_rows for part in doomed_rows(place, doomed, doomed.columns)))
            else:
                erased = erase_rows(place, doomed)
                vacuumed += vacuum(place, hours=hours)
            counts[source.name] = max(counts.get(source.name, 0), erased.rows)
            done += erased
    report = PruneReport(before_us, counts, done.files, vacuumed, tuple(overruled), dry_run)
    if not dry_run:
        with workspace.catalog.write() as rows:
            run = rows.start_run(PRUNE_KIND, "events", started_us=now_us)
            rows.finish_run(run, "pruned", report.to_document(), finished_us=workspace.clock.now_us())
    return report


def needs(workspace: Workspace, source: EventSource) -> list[Need]:
    """Who looks back at a source's events, and how far."""
    definitions, settings = workspace.definitions, workspace.configured
    now_us = workspace.clock.now_us()
    watched_us = now_us - parse_duration_us(settings.monitoring.window)
    modelled = {view.ref for model in definitions.models.values() for view in model.views}
    found: list[Need] = []
    for view in definitions.views.values():
        if view.source.name == source.name:
            found.append(Need(f"feature view {view.ref}", earliest_us([view], np.array([now_us]))))
            if view.ref in modelled:
                since_us = earliest_us([view], np.array([watched_us]))
                found.append(Need(f"the parity check of {view.ref} (monitoring.window)", since_us))
    texts = (*settings.training.instants, *settings.training.validation_instants)
    instants = np.array(sorted(parse_instant_us(each) for each in texts), dtype=np.int64)
    for model in definitions.models.values() if len(instants) else ():
        if source.name not in {each.name for each in model_sources(model)}:
            continue
        since = [int(instants[0])]
        views = [view for view in model.views if view.source.name == source.name]
        reaches = [earliest_us(views, instants)] if views else []
        active_us = model.population.active_within_us
        reaches.append(None if active_us is None else since[0] - active_us)
        past = None if None in reaches else min([*since, *(each for each in reaches if each is not None)])
        found.append(Need(f"training {model.name!r} at {format_instant(since[0])}", past))
    return found


def _before(source: EventSource, before_us: int) -> Doomed:
    return Doomed(
        columns=(source.event_time,),
        rows=partial(_is_before, column=source.event_time, before_us=before_us),
        files=partial(_edge_is_before, name=f"min.{source.event_time}", before_us=before_us, unknown=True),
        whole=partial(_edge_is_before, name=f"max.{source.event_time}", before_us=before_us, unknown=False),
    )


def _is_before(rows: pa.Table, *, column: str, before_us: int) -> NDArray[np.bool_]:
    return times_us(rows.column(column)) < before_us


def _edge_is_before(file: Mapping[str, Any], *, name: str, before_us: int, unknown: bool) -> bool:
    """Whether the first or last event of a file is before an instant, by its statistics."""
    edge = file.get(name)
    if edge is None:
        return unknown
    edge_us = pa.scalar(edge, TIMESTAMP).cast(pa.int64()).as_py()
    return bool(edge_us < before_us)
