"""What is declared, against what is registered: plan, apply, look up.

A feature view carries its version, and a changed meaning needs a higher one: training sets and
rings of one version must mean one thing. The registry refuses a change under the same version
and says what changed. Versions of a view may be declared side by side; one that a serving model
reads can't go. Other declarations carry no version; a changed one becomes their next. An
entity's keys and the columns of a source that events were stored under can't change at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import orjson

from heliostat.clock import Clock
from heliostat.errors import DefinitionConflictError, UnknownViewError, ViewInUseError
from heliostat.features.definitions import FeatureView
from heliostat.features.metadata import FeatureMetadata, about_view, all_metadata, serving_readers
from heliostat.features.precomputed import WrittenSource
from heliostat.storage.catalog import Catalog, CatalogReader
from heliostat.storage.catalog_tables import DefinitionRow

Document = Mapping[str, Any]
Kind = Literal["entity", "source", "view", "label", "model"]
KINDS: Final[tuple[Kind, ...]] = ("entity", "source", "view", "label", "model")


class Declared(Protocol):
    """Anything that can be registered."""

    @property
    def name(self) -> str:
        """Identifier."""
        ...

    @property
    def description(self) -> str:
        """One line."""
        ...

    @property
    def content_hash(self) -> str:
        """Changes if and only if the meaning does."""
        ...

    def describe(self) -> dict[str, Any]:
        """All that the meaning depends on."""
        ...


class DeclaredSet(Protocol):
    """Everything that a use case declares: `heliostat.models.definitions.Definitions`."""

    @property
    def entities(self) -> Mapping[str, Declared]:
        """Entities by name."""
        ...

    @property
    def sources(self) -> Mapping[str, Declared]:
        """Event sources by name."""
        ...

    @property
    def views(self) -> Mapping[str, FeatureView]:
        """Feature views by reference, ``name@version``."""
        ...

    @property
    def labels(self) -> Mapping[str, Declared]:
        """Labels by name."""
        ...

    @property
    def models(self) -> Mapping[str, Declared]:
        """Model specs by name."""
        ...


@dataclass(frozen=True, slots=True)
class Change:
    """What applying does to one declaration.

    Attributes:
        kind: ``entity``, ``source``, ``view``, ``label`` or ``model``.
        name: Identifier.
        version: The version after; for a removed one, the version that goes.
        previous: The version that it replaces, or None.
        differences: What changed, one line each: against ``previous``, or a version of the view beside it.
        beside: Other versions of the view that stay declared.
    """

    kind: Kind
    name: str
    version: int
    previous: int | None = None
    differences: tuple[str, ...] = ()
    beside: tuple[int, ...] = ()

    @property
    def ref(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    def to_document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "kind": self.kind,
            "name": self.name,
            "version": self.version,
            "previous": self.previous,
            "differences": list(self.differences),
            "beside": list(self.beside),
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What applying would do, or has done."""

    added: tuple[Change, ...]
    changed: tuple[Change, ...]
    removed: tuple[Change, ...]
    unchanged: tuple[Change, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the registry already says what is declared."""
        return not (self.added or self.changed or self.removed)

    @property
    def new_views(self) -> tuple[str, ...]:
        """References of the views that have no rings yet."""
        changes = (*self.added, *self.changed)
        return tuple(each.ref for each in changes if each.kind == "view" and each.previous != each.version)

    def to_document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            name: [change.to_document() for change in getattr(self, name)]
            for name in ("added", "changed", "removed", "unchanged")
        }


@dataclass(frozen=True, slots=True)
class _Step:
    change: Change
    declared: Declared | None
    stored: DefinitionRow | None
    """The row of ``change.version``, if there is one."""

    @property
    def retires(self) -> tuple[int, ...]:
        """The versions that go."""
        change = self.change
        if self.declared is None:
            return (change.version,)
        return () if change.previous in (None, change.version) else (change.previous,)


class FeatureRegistry:
    """Keeps what is declared, by version.

    Args:
        catalog: Where it is kept.
        clock: Tells when something was registered.
    """

    def __init__(self, catalog: Catalog, clock: Clock) -> None:
        self._catalog, self._clock = catalog, clock

    def plan(self, declared: DeclaredSet, *, keep: bool = False) -> Plan:
        """What `apply` would do; changes nothing.

        Raises:
            DefinitionConflictError: If `apply` would refuse it.
            ViewInUseError: As well.
        """
        with self._catalog.read() as rows:
            return _planned(_checked_steps(rows, declared, keep))

    def apply(self, declared: DeclaredSet, *, keep: bool = False) -> Plan:
        """Register what is declared and retire what isn't any more, in one transaction.

        Args:
            declared: All that there is to be.
            keep: Retire nothing but what a changed declaration replaces; views stay beside their new versions.

        Returns:
            What was done.

        Raises:
            DefinitionConflictError: If a view changed without a higher version, or something changed
                that can't. Nothing is registered then.
            ViewInUseError: If a version of a view would go that a serving model version reads. Nothing
                is registered then.
        """
        now_us = self._clock.now_us()
        with self._catalog.write() as rows:
            steps = _checked_steps(rows, declared, keep)
            for step in steps:
                change = step.change
                for version in step.retires:
                    rows.retire_definition(change.kind, change.name, version, retired_us=now_us)
                if step.declared is None:
                    continue
                document = _document(step.declared)
                if step.stored is None:
                    rows.add_definition(
                        DefinitionRow(
                            change.kind, change.name, change.version, step.declared.content_hash, document, now_us
                        )
                    )
                elif step.stored.document != document or step.stored.retired_us is not None:
                    rows.refresh_definition(change.kind, change.name, change.version, document)
        return _planned(steps)

    def list(self, kind: Kind | None = None) -> tuple[DefinitionRow, ...]:
        """What is registered and not retired."""
        with self._catalog.read() as rows:
            return rows.definitions(kind)

    def retired_views(self) -> tuple[str, ...]:
        """References of the versions of views that were registered once and are not any more."""
        with self._catalog.read() as rows:
            found = rows.definitions("view", retired=True)
        return tuple(f"{row.name}@{row.version}" for row in found if row.retired_us is not None)

    def features(self, text: str = "") -> tuple[FeatureMetadata, ...]:
        """Features, in declared order within a view.

        Args:
            text: Words that a feature's name, function, description, tags, owner, source, columns or models
                must contain, all of them.
        """
        words = text.lower().split()
        with self._catalog.read() as rows:
            infos = tuple(all_metadata(rows))
        return tuple(info for info in infos if all(word in info.searchable for word in words))

    def view(self, view: str) -> tuple[FeatureMetadata, ...]:
        """The features of one version of a view.

        Args:
            view: ``name@version``; of a bare name, its highest version.

        Raises:
            UnknownViewError: Naming those that are registered.
        """
        infos = self.features()
        versions = [info.version for info in infos if view in (info.view, f"{info.view}@{info.version}")]
        if not versions:
            raise UnknownViewError(view, tuple(dict.fromkeys(f"{info.view}@{info.version}" for info in infos)))
        return tuple(info for info in infos if info.view == view.partition("@")[0] and info.version == max(versions))


def _by_kind(declared: DeclaredSet) -> dict[Kind, Mapping[str, Declared]]:
    return {
        "entity": declared.entities,
        "source": declared.sources,
        "view": declared.views,
        "label": declared.labels,
        "model": declared.models,
    }


def _document(declared: Declared) -> dict[str, Any]:
    about: dict[str, Any] = {"description": declared.description}
    if isinstance(declared, FeatureView):
        about |= about_view(declared)
    # As it comes back from the catalog, so that equal documents compare equal: tuples become lists.
    document: dict[str, Any] = orjson.loads(orjson.dumps({"meaning": declared.describe(), "about": about}))
    return document


def _checked_steps(rows: CatalogReader, declared: DeclaredSet, keep: bool) -> list[_Step]:
    """What is to be done; refuses to retire what a serving model version reads."""
    steps = list(_steps(rows, declared, keep))
    readers = serving_readers(rows) if any(step.retires for step in steps) else {}
    for step in steps:
        for version in step.retires:
            ref = f"{step.change.name}@{version}"
            if step.change.kind == "view" and ref in readers:
                raise ViewInUseError(ref, tuple(readers[ref]))
    return steps


def _steps(rows: CatalogReader, declared: DeclaredSet, keep: bool) -> Iterator[_Step]:
    for kind, items in _by_kind(declared).items():
        stored: dict[str, list[DefinitionRow]] = {}
        for row in rows.definitions(kind, retired=True):
            stored.setdefault(row.name, []).append(row)
        by_name: dict[str, list[Declared]] = {}
        for item in items.values():
            by_name.setdefault(item.name, []).append(item)
        for name, versions in by_name.items():
            yield from _name_steps(kind, versions, stored.get(name, []), keep)
        for name, versions_stored in stored.items():
            live = [row for row in versions_stored if row.retired_us is None]
            if name not in by_name and not keep:
                yield from (_removal(kind, row) for row in live)


def _removal(kind: Kind, row: DefinitionRow) -> _Step:
    return _Step(Change(kind, row.name, row.version, row.version), None, row)


def _name_steps(kind: Kind, items: list[Declared], stored: list[DefinitionRow], keep: bool) -> Iterator[_Step]:
    """What becomes of the declarations of one name: one, or the versions of a view.

    Args:
        kind: Of what.
        items: What is declared.
        stored: All that was ever registered under the name, by version.
        keep: Whether versions of a view that aren't declared stay all the same.
    """
    live = {row.version: row for row in stored if row.retired_us is None}
    newest = stored[-1] if stored else None
    last = max(live.values(), key=lambda row: row.version, default=newest)
    wanted: dict[int, Declared] = {}
    for item in items:
        if isinstance(item, FeatureView):
            wanted[item.version] = item
        elif last is None or last.content_hash == item.content_hash:
            wanted[1 if last is None else last.version] = item
        else:
            wanted[stored[-1].version + 1] = item
    leaving = [] if keep and kind == "view" else sorted(live.keys() - wanted.keys())
    staying = (live.keys() | wanted.keys()) - set(leaving)
    for version, item in sorted(wanted.items()):
        previous = version if version in live else leaving.pop() if leaving else None
        beside = tuple(sorted(staying - {version}))
        yield _step(kind, item, version, previous, beside, stored, last)
    yield from (_removal(kind, live[version]) for version in leaving)


def _step(
    kind: Kind,
    item: Declared,
    version: int,
    previous: int | None,
    beside: tuple[int, ...],
    stored: list[DefinitionRow],
    last: DefinitionRow | None,
) -> _Step:
    """What becomes of one declaration.

    Raises:
        DefinitionConflictError: If that version means something else already, or can't be any more.
    """
    by_version = {row.version: row for row in stored}
    meaning = _document(item)["meaning"]
    same = by_version.get(version)
    if same is not None and same.content_hash != item.content_hash:
        details = tuple(_differences(same.document["meaning"], meaning))
        raise DefinitionConflictError(
            f"feature view {item.name}@{version}",
            details or ("another meaning",),
            f"Raise its version to {stored[-1].version + 1}, or take the change back",
        )
    if same is None and stored and version < stored[-1].version:
        raise DefinitionConflictError(
            f"feature view {item.name}",
            (f"version {stored[-1].version} is registered and {version} never was",),
            f"Raise its version to {stored[-1].version + 1}",
        )
    if not isinstance(item, WrittenSource):  # of which the view says what to do
        _check_fixed(kind, item.name, meaning, last)
    base = by_version.get(previous) if previous is not None else last
    differences = () if base is None else tuple(_differences(base.document["meaning"], meaning))
    return _Step(Change(kind, item.name, version, previous, differences, beside), item, same)


def _check_fixed(kind: Kind, name: str, meaning: Document, last: DefinitionRow | None) -> None:
    """Refuse what stored events and keys rest on: an entity's keys; a source's columns, time, id and entities."""
    if last is None or kind not in ("entity", "source"):
        return
    old, new = dict(last.document["meaning"]), dict(meaning)
    if kind == "source":  # it may gain columns
        old["schema"] = sorted(old["schema"])
        new["schema"] = sorted(column for column in new["schema"] if column in old["schema"])
    details = tuple(_differences(old, new))
    if details:
        fix = "Events are stored under it: declare a new one under another name"
        raise DefinitionConflictError(f"{kind} {name!r}", details, fix)


def _differences(old: object, new: object, path: str = "") -> Iterator[str]:
    """One line for each place where two JSON documents differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            place = f"{path}.{key}" if path else str(key)
            if key not in new:
                yield f"{place} is gone"
            elif key not in old:
                yield f"{place} is new"
            else:
                yield from _differences(old[key], new[key], place)
    elif old != new:
        yield f"{path} was {old!r} and is {new!r}"


def _planned(steps: list[_Step]) -> Plan:
    sorted_out: dict[str, list[Change]] = {"added": [], "changed": [], "removed": [], "unchanged": []}
    for step in steps:
        change = step.change
        if step.declared is None:
            where = "removed"
        elif change.previous is None:
            where = "added"
        elif change.previous != change.version or (step.stored and step.stored.document != _document(step.declared)):
            where = "changed"
        else:
            where = "unchanged"
        sorted_out[where].append(change)
    return Plan(**{name: tuple(changes) for name, changes in sorted_out.items()})
