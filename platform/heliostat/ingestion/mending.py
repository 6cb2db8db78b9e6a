"""Rings in which an event may count twice: found by the sink, made anew from the log.

The online store remembers an event's id for as long as its tile is open. An older event that the log
has, from a file or from long ago, and that is sent live again is one event to the log, but new to the
rings. The sink is told by the log that it had the event; this makes the rings of its entity anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import orjson
import pyarrow as pa

from heliostat.clock import Clock
from heliostat.errors import ConflictError
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.online.bucket_rings import BucketTask
from heliostat.online.tiles import RingLimits
from heliostat.storage.event_log import EventLog
from heliostat.storage.online_store import OnlineConfig, OnlineStore
from heliostat.storage.streams import Streams

_log = logging.getLogger(__name__)


class RingMender:
    """Remembers whose rings have to be made anew, and makes them.

    Args:
        streams: Where it is remembered, so that a killed sink forgets nobody.
        event_log: What the rings are made from.
        online: Where they are.
        views: All that are declared.
        limits: What the rings' layouts allow for.
        clock: Tells the present.
    """

    def __init__(
        self,
        streams: Streams,
        event_log: EventLog,
        online: OnlineConfig,
        views: Iterable[FeatureView],
        limits: RingLimits,
        clock: Clock,
    ) -> None:
        self._streams, self._log, self._online, self._limits, self._clock = streams, event_log, online, limits, clock
        self._views: dict[tuple[str, str], list[FeatureView]] = {}
        for view in views:
            self._views.setdefault((view.source.name, view.entity.name), []).append(view)

    def note(self, source: EventSource, entity: Entity, events: pa.Table) -> None:
        """Remember the entities of events that the log had already.

        Args:
            source: Where they come from.
            entity: The entity that is meant.
            events: Columns of the source.

        Raises:
            OnlineStoreUnavailableError: If the server doesn't answer.
        """
        if events.num_rows and (source.name, entity.name) in self._views:
            texts = entity.encode(events, what=f"events of {source.name!r}").cast(pa.string()).unique().to_pylist()
            self._streams.note([orjson.dumps([source.name, entity.name, text]) for text in texts])

    def mend(self) -> int:
        """Make the rings of all who are remembered anew.

        Returns:
            How many entities that were.

        Raises:
            StorageError: If the log can't be read or the store doesn't answer; nobody is forgotten.
        """
        notes = self._streams.noted()
        if not notes:
            return 0
        by_part: dict[tuple[str, str], list[str]] = {}
        for note in notes:
            source, entity, text = orjson.loads(note)
            by_part.setdefault((source, entity), []).append(text)
        done: list[bytes] = []
        with OnlineStore(self._online) as store:
            for part, texts in by_part.items():
                made = texts if part not in self._views else self._made(self._views[part], texts, store)
                done += [orjson.dumps([*part, text]) for text in made]
        self._streams.unnote(done)
        return len(done)

    def _made(self, views: Sequence[FeatureView], texts: Sequence[str], store: OnlineStore) -> list[str]:
        """Whose rings were made anew; those of others are written by somebody else just now, and wait."""
        source, entity = views[0].source, views[0].entity
        version = self._log.version(source, entity)
        task = BucketTask(tuple(views), self._log, version, self._online, self._clock.now_us(), self._limits)
        buckets = entity.buckets(entity.encoded(texts), self._log.n_buckets)
        made: list[str] = []
        for bucket in np.unique(buckets).tolist():
            chosen = [texts[at] for at in np.flatnonzero(buckets == bucket).tolist()]
            try:
                counts = task.remake(bucket, chosen, store)
            except ConflictError as error:
                _log.info("rings of bucket %d are mended later: %s", bucket, error)
                continue
            if not counts.busy:
                made += chosen
        return made
