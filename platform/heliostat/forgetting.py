"""Erasure requests: everything about one entity goes, from every store and from their files.

In passes, each in this order: the entity's rings and cached results; streams into tables; then its
rows out of all tables. A pass that finds no row ends it, so that what came in meanwhile is gone
too; what comes in after that is a new entity's. Then the bytes: streams, tables' old files and
the server's append-only file are written anew without it.

Every step finds what is left by looking, never by remembering, so that a run that was killed is
simply run again, and a second run changes nothing. The one thing that can't be found again, whose
rings had a share of the erased events (shops, if a customer is forgotten), is put down before.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final
from urllib.parse import quote

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.errors import ConflictError, EntityBusyError, StaleProgressError
from heliostat.features.definitions import Entity, EntityKey, EventSource, FeatureView
from heliostat.features.subject import Subject, rows_by_text
from heliostat.ingestion.sink import Sink
from heliostat.online.bucket_rings import BucketTask
from heliostat.online.tiles import RingLimits
from heliostat.schema import BUCKET
from heliostat.storage.delta import Table, arrow_schema
from heliostat.storage.erasure import (
    Doomed,
    Erased,
    ServerEraser,
    doomed_rows,
    erase_rows,
    uncommitted_with,
    vacuum,
)
from heliostat.storage.offline_store import Kind
from heliostat.storage.places import joined, subfolders
from heliostat.workspace import Workspace

FORGET_KIND: Final = "forget"
"""How an erasure is filed among the catalog's runs; its subject names the entity and a hash of the key."""

_PASSES: Final = 8
_TRIES: Final = 5


@dataclass(frozen=True)
class ForgetReport:
    """What an erasure did.

    Attributes:
        entity: The entity's name.
        digest: What stands for its key: see `key_digest`.
        rows: Rows that went, by table.
        keys: Keys that went from the online store.
        others: Entities whose rings were made anew without the erased events, by name.
        passes: How often everything was looked at; 1: there was nothing.
        vacuumed: Old files that were deleted.
        left: What couldn't be done, as sentences; empty: everything is gone.
    """

    entity: str
    digest: str
    rows: Mapping[str, int]
    keys: int
    others: Mapping[str, int]
    passes: int
    vacuumed: int
    left: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0, or that of a conflict if something is left."""
        return EntityBusyError.exit_code if self.left else 0

    def to_document(self) -> dict[str, Any]:
        """As JSON can carry it; the key isn't in it."""
        return {
            "entity": self.entity,
            "digest": self.digest,
            "rows": dict(self.rows),
            "keys": self.keys,
            "others": dict(self.others),
            "passes": self.passes,
            "vacuumed": self.vacuumed,
            "left": list(self.left),
        }

    def lines(self) -> list[str]:
        """A report for people."""
        lines = [f"{self.entity} {self.digest}: {sum(self.rows.values()):,} rows and {self.keys:,} keys are gone"]
        lines += [f"  {rows:,} of {table}" for table, rows in self.rows.items()]
        lines += [f"  rings of {n:,} {name} were made anew" for name, n in self.others.items()]
        return [*lines, f"  {self.vacuumed:,} old files deleted", *(f"  left: {each}" for each in self.left)]


def key_digest(project: str, entity: Entity, text: str) -> str:
    """What the catalog keeps of a forgotten key: whoever has the key can tell that it was forgotten.

    It is slow on purpose (scrypt, some 50 ms), so that trying out keys is dear; a key out of few can
    still be guessed.
    """
    salt = f"heliostat:{project}:{entity.name}".encode()
    return hashlib.scrypt(text.encode(), salt=salt, n=2**14, r=8, p=1, dklen=16).hex()


def forget(workspace: Workspace, entity: Entity, key: EntityKey, *, exclusive: bool = False) -> ForgetReport:
    """Erase everything about an entity: events, predictions, actuals, snapshots, batch results, rings, caches.

    Models that learned from it stay. Earlier versions of the tables can't be read afterwards: a job that
    reads one at this moment fails and is to be run again.

    Args:
        workspace: Log, offline store, online store, catalog and declarations.
        entity: Whose key it is.
        key: As users write it.
        exclusive: Nothing else writes now: files that were never committed go as well.

    Raises:
        InvalidValueError: If it is no key of the entity.
        EntityBusyError: If events about it keep coming in.
        StorageError: If a store can't be reached. Run it again: what is gone is gone.
    """
    text = entity.text(key)
    digest = key_digest(workspace.configured.project, entity, text)
    with workspace.catalog.write() as rows:
        run = rows.start_run(FORGET_KIND, f"{entity.name}:{digest}", started_us=workspace.clock.now_us())
    outcome, report = "failed", dict[str, Any]()
    try:
        with ServerEraser(workspace.online_config) as server:
            done = _Forgetting(workspace, entity, text, digest, server).run(exclusive=exclusive)
        outcome, report = "incomplete" if done.left else "forgotten", done.to_document()
    except BaseException as error:
        report = {"error": type(error).__name__}  # its text might name the key
        raise
    else:
        return done
    finally:
        with workspace.catalog.write() as rows:
            rows.finish_run(run, outcome, report, finished_us=workspace.clock.now_us())


class _Forgetting:
    """One run over all stores."""

    def __init__(self, workspace: Workspace, entity: Entity, text: str, digest: str, server: ServerEraser) -> None:
        self._workspace, self._entity, self._digest = workspace, entity, digest
        self._subject = Subject(entity, text)
        self._server, self._keys = server, server.keys
        self._mending = f"{self._keys.root}:mending:{digest}"
        self._rows: Counter[str] = Counter()

    def run(self, *, exclusive: bool) -> ForgetReport:
        keys = 0
        for passes in itertools.count(1):
            keys += self._server.delete(self._own_keys())
            self._drain()
            self._unnote()
            if not self._erase_rows():
                break
            if passes == _PASSES:
                raise EntityBusyError(self._entity.name, _PASSES)
        others = self._mend_others()
        self._server.rewrite_streams(self._streams())
        vacuumed = sum(vacuum(table, exclusive=exclusive) for _, table, _ in self._tables())
        left = (*self._uncommitted(), *self._server.rewrite_files())
        return ForgetReport(self._entity.name, self._digest, dict(self._rows), keys, others, passes, vacuumed, left)

    def _by_columns(self, files: Callable[[Mapping[str, Any]], bool] | None = None) -> Doomed:
        columns = tuple(self._subject.parts)
        return Doomed(columns, self._subject.rows) if files is None else Doomed(columns, self._subject.rows, files)

    def _by_text(self, owner: Entity | None) -> Doomed:
        meant = partial(self._subject.is_meant, owner)
        return Doomed(("entity",), partial(rows_by_text, column="entity", meant=meant))

    # ── Tables ───────────────────────────────────────────────────────────────────

    @property
    def _declared_views(self) -> Collection[FeatureView]:
        return self._workspace.definitions.views.values()

    @cached_property
    def _models(self) -> Mapping[str, Entity]:
        return {name: spec.entity for name, spec in self._workspace.definitions.models.items()}

    def _tables(self) -> Iterator[tuple[str, Table, Doomed]]:
        """Every table that may hold something, as it is called, with what is to go from it."""
        for source, entity, table, doomed in self._event_tables():
            yield f"events/{source}/{entity}", table, doomed
        store, definitions = self._workspace.offline_store, self._workspace.definitions
        views = {view.ref: (view.entity,) for view in definitions.views.values()}
        kinds: tuple[tuple[Kind, Mapping[str, tuple[Entity, ...]]], ...] = (
            ("features", views),
            ("batch", {name: (entity,) for name, entity in self._models.items()}),
        )
        for kind, owners in kinds:
            for name in store.tables(kind):
                table = store.table(kind, name)
                if self._subject.has_columns(owners.get(name, ()), _columns(table)):
                    yield f"{kind}/{name}", table, self._by_columns()
        # Actuals name predictions: those go while the predictions are still there to say which.
        for model in store.tables("actuals"):
            ids = self._prediction_ids(model)
            owner = self._models.get(model)
            told = partial(_is_actual, meant=partial(self._subject.is_meant, owner), ids=ids)
            yield f"actuals/{model}", store.table("actuals", model), Doomed(("entity", "prediction_id"), told)
        for model in store.tables("predictions"):
            yield f"predictions/{model}", store.table("predictions", model), self._by_text(self._models.get(model))
        for name in store.tables("dead_letters"):
            letters = partial(rows_by_text, column="event", meant=self._subject.is_in_letter)
            yield f"dead_letters/{name}", store.table("dead_letters", name), Doomed(("event",), letters)

    def _event_tables(self) -> Iterator[tuple[str, str, Table, Doomed]]:
        log, declared = self._workspace.event_log, self._workspace.definitions.sources
        for source in subfolders(log.root, log.storage_options, "events"):
            owners = tuple(declared[source].entities) if source in declared else ()
            for name in subfolders(log.root, log.storage_options, "events", source):
                table = Table(joined(log.root, "events", source, name), log.storage_options, BUCKET)
                if not self._subject.has_columns(owners, _columns(table)):
                    continue
                only = None
                if name == self._entity.name:
                    bucket = int(self._entity.buckets(self._subject.encoded, log.n_buckets)[0])
                    only = partial(_is_of_bucket, bucket=bucket)
                yield source, name, table, self._by_columns(only)

    def _erase_rows(self) -> int:
        """One look at all tables; how many rows went."""
        self._note_traces()
        erased = Erased()
        for name, table, doomed in self._tables():
            found = erase_rows(table, doomed)
            if found.rows:
                self._rows[name] = self._rows[name] + found.rows
            erased += found
        return erased.rows

    def _prediction_ids(self, model: str) -> pa.Array:
        doomed = self._by_text(self._models.get(model))
        parts = doomed_rows(self._workspace.offline_store.table("predictions", model), doomed, ["prediction_id"])
        return pa.concat_arrays(
            [pa.array([], pa.string()), *(part.column("prediction_id").combine_chunks() for part in parts)]
        )

    def _uncommitted(self) -> Iterator[str]:
        for name, table, doomed in self._tables():
            files = uncommitted_with(table, doomed)
            if files:
                yield (
                    f"{files} files of {name} that nobody has committed, perhaps yet: "
                    "run this again in a day, or with --exclusive while nothing writes"
                )

    # ── The online store ─────────────────────────────────────────────────────────

    def _own_keys(self) -> list[str]:
        """Rings and cached batch results about the entity, of any view or model that there ever was."""
        text = str(next(iter(self._subject.parts.values())))
        prefix = f"{self._keys.root}:"
        found: list[str] = []
        for key in dict.fromkeys((*self._server.find(text), *self._server.find(quote(text, safe="")))):
            kind, _, rest = key.removeprefix(prefix).partition(":")
            if kind == "r" and rest.count(":") >= 3:
                _, entity, _, about = rest.split(":", 3)
                owner = self._workspace.definitions.entities.get(entity)
            elif kind == "batch" and ":" in rest:
                model, _, about = rest.partition(":")
                owner = self._models.get(model)
            else:
                continue
            if self._subject.is_meant(owner, about):
                found.append(key)
        return [*found, *self._bucket_states()]

    def _bucket_states(self) -> list[str]:
        """What materialization notes of a bucket, where it names the entity; without it, all of that is made anew."""
        views = {view.ref: view.entity for view in self._declared_views}
        prefix = f"{self._keys.root}:m:"
        states = self._workspace.online.get_many([key for key in self._server.find("m:") if key.startswith(prefix)])
        return [
            key
            for key, document in states.items()
            if any(
                self._subject.is_meant(views.get(key.removeprefix(prefix).partition(":")[0]), text)
                for text in orjson.loads(document).get("left", ())
            )
        ]

    def _drain(self) -> None:
        """Everything that waits in streams into its tables; of sources that nobody declares, out of them."""
        sink = Sink.of(self._workspace)
        for attempt in range(_TRIES):
            try:
                sink.drain_once()
                break
            except StaleProgressError:
                if attempt == _TRIES - 1:
                    raise
        declared = {self._keys.events(name, 0).partition("{")[0] for name in self._workspace.definitions.sources}
        for stream in self._streams():
            if stream.startswith(f"{self._keys.root}:events:") and stream.partition("{")[0] not in declared:
                self._server.delete_entries(stream, lambda payload: self._subject.is_in_letter(payload.decode()))

    def _unnote(self) -> None:
        """Out of what the sink has noted of rings that it makes anew."""
        views = {(view.source.name, view.entity.name): view.entity for view in self._declared_views}
        streams = self._workspace.streams
        meant: list[bytes] = []
        for note in streams.noted():
            source, name, text = orjson.loads(note)
            if self._subject.is_meant(views.get((source, name)), text):
                meant.append(note)
        streams.unnote(meant)

    def _streams(self) -> list[str]:
        records = (self._workspace.streams.record_stream(name) for name in ("predictions", "actuals"))
        events = self._server.find("events:")
        return [*records, *(key for key in events if key.startswith(f"{self._keys.root}:events:"))]

    # ── Whoever else had a share in these events ─────────────────────────────────

    def _note_traces(self) -> None:
        """Forget that its events were seen, and put down whose rings they are in, before they go."""
        declared, n_buckets = self._workspace.definitions.sources, self._workspace.event_log.n_buckets
        for name, _, table, doomed in self._event_tables():
            source = declared.get(name)
            if source is None:
                continue
            columns = [source.event_id, *(column for each in source.entities for column in each.key_columns)]
            for rows in doomed_rows(table, doomed, list(dict.fromkeys(columns))):
                ids = rows.column(source.event_id).cast(pa.string()).to_pylist()
                for entity in source.entities:
                    encoded = entity.encode(rows)
                    buckets = entity.buckets(encoded, n_buckets).tolist()
                    seen = [
                        self._keys.seen(name, entity.name, each, bucket)
                        for each, bucket in zip(ids, buckets, strict=True)
                    ]
                    self._server.delete(seen)
                    if entity.name != self._entity.name:
                        texts = pc.unique(encoded.cast(pa.string())).to_pylist()
                        notes = [json.dumps([name, entity.name, text]) for text in texts]
                        self._server.remember(self._mending, notes)

    def _mend_others(self) -> dict[str, int]:
        """Make the rings of others anew, from the log as it is now."""
        sources = self._workspace.definitions.sources
        by_part: dict[tuple[str, str], list[str]] = {}
        for note in self._server.remembered(self._mending):
            source, entity, text = json.loads(note)
            by_part.setdefault((source, entity), []).append(text)
        counts: Counter[str] = Counter()
        for (name, entity_name), texts in by_part.items():
            source = sources.get(name)
            views = [
                view
                for view in self._declared_views
                if source is not None and view.source.name == name and view.entity.name == entity_name
            ]
            if source is not None and views:
                self._mend(source, views, texts)
                counts[entity_name] += len(texts)
        self._server.delete([self._mending])
        return dict(counts)

    def _mend(self, source: EventSource, views: Sequence[FeatureView], texts: Sequence[str]) -> None:
        workspace, entity = self._workspace, views[0].entity
        limits, now_us = RingLimits.of(workspace.configured.ingestion), workspace.clock.now_us()
        buckets = entity.buckets(entity.encoded(texts), workspace.event_log.n_buckets)
        version = workspace.event_log.version(source, entity)
        gone = tuple(workspace.retired_views())
        task = BucketTask(
            tuple(views), workspace.event_log, version, workspace.online_config, now_us, limits, gone=gone
        )
        for bucket in np.unique(buckets).tolist():
            own = [texts[at] for at in np.flatnonzero(buckets == bucket).tolist()]
            try:
                done = not task.remake(bucket, own, workspace.online).busy
            except ConflictError:
                done = False
            if not done:  # somebody writes them just now: the sink does it after that
                workspace.streams.note([orjson.dumps([source.name, entity.name, text]) for text in own])


def _columns(table: Table) -> list[str]:
    current = table.open()
    return [] if current is None else list(arrow_schema(current).names)


def _is_of_bucket(file: Mapping[str, Any], *, bucket: int) -> bool:
    return bool(file[f"partition.{BUCKET}"] == bucket)


def _is_actual(rows: pa.Table, *, meant: Callable[[str], bool], ids: pa.Array) -> NDArray[np.bool_]:
    named = pc.is_in(rows.column("prediction_id"), value_set=ids).to_numpy()
    return np.asarray(named | rows_by_text(rows, column="entity", meant=meant))
