"""What is declared, against what is registered: plan, apply, look up.

A feature view carries its version, and a changed meaning needs a higher one: training sets and
rings of one version must mean one thing. The registry refuses a change under the same version
and says what changed. Other declarations carry no version; a changed one becomes their next.
An entity's keys and the columns of a source that events were stored under can't change at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import orjson

from heliostat.clock import Clock, format_instant
from heliostat.errors import DefinitionConflictError, UnknownViewError
from heliostat.features.definitions import FeatureView
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
        """Feature views by name."""
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
        previous: The version before, or None.
        differences: What changed, one line each.
    """

    kind: Kind
    name: str
    version: int
    previous: int | None = None
    differences: tuple[str, ...] = ()

    def to_document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "kind": self.kind,
            "name": self.name,
            "version": self.version,
            "previous": self.previous,
            "differences": list(self.differences),
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

    def to_document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            name: [change.to_document() for change in getattr(self, name)]
            for name in ("added", "changed", "removed", "unchanged")
        }


@dataclass(frozen=True, slots=True)
class FeatureInfo:
    """What the registry knows about one feature.

    Attributes:
        name: Qualified: ``view__feature``.
        view: The view's name.
        version: The view's version.
        type: Of its values in a matrix.
        function: Such as ``Sum(amount) over 30d``, or ``derived from …``.
        description: The view's.
        tags: The view's.
        owner: The view's.
        entity: What it describes.
        source: Where its events come from.
        created_us: When this version of the view was registered.
        used_by: Models that are declared to read it, sorted.
    """

    name: str
    view: str
    version: int
    type: str
    function: str
    description: str
    tags: Mapping[str, str]
    owner: str
    entity: str
    source: str
    created_us: int
    used_by: tuple[str, ...]

    def to_document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "name": self.name,
            "view": self.view,
            "version": self.version,
            "type": self.type,
            "function": self.function,
            "description": self.description,
            "tags": dict(self.tags),
            "owner": self.owner,
            "entity": self.entity,
            "source": self.source,
            "created": format_instant(self.created_us),
            "used_by": list(self.used_by),
        }


@dataclass(frozen=True, slots=True)
class _Step:
    change: Change
    declared: Declared | None
    stored: DefinitionRow | None
    """The row of ``change.version``, if there is one."""


class FeatureRegistry:
    """Keeps what is declared, by version.

    Args:
        catalog: Where it is kept.
        clock: Tells when something was registered.
    """

    def __init__(self, catalog: Catalog, clock: Clock) -> None:
        self._catalog, self._clock = catalog, clock

    def plan(self, declared: DeclaredSet) -> Plan:
        """What `apply` would do; changes nothing.

        Raises:
            DefinitionConflictError: If `apply` would refuse it.
        """
        with self._catalog.read() as rows:
            return _planned(_steps(rows, declared))

    def apply(self, declared: DeclaredSet) -> Plan:
        """Register what is declared and retire what isn't any more, in one transaction.

        Returns:
            What was done.

        Raises:
            DefinitionConflictError: If a view changed without a higher version, or something changed
                that can't. Nothing is registered then.
        """
        now_us = self._clock.now_us()
        with self._catalog.write() as rows:
            steps = list(_steps(rows, declared))
            for step in steps:
                change = step.change
                if step.declared is None:
                    rows.retire_definition(change.kind, change.name, change.version, retired_us=now_us)
                    continue
                if change.previous is not None and change.previous != change.version:
                    rows.retire_definition(change.kind, change.name, change.previous, retired_us=now_us)
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

    def features(self, text: str = "") -> tuple[FeatureInfo, ...]:
        """Features, in declared order within a view.

        Args:
            text: Words that a feature's name, description, tags, owner or source must contain, all of them.
        """
        words = text.lower().split()
        with self._catalog.read() as rows:
            infos = tuple(_infos(rows))
        return tuple(info for info in infos if all(word in _searchable(info) for word in words))

    def view(self, view: str) -> tuple[FeatureInfo, ...]:
        """The features of one view.

        Args:
            view: Its name, with or without ``@version``.

        Raises:
            UnknownViewError: Naming those that are registered.
        """
        infos = self.features()
        found = tuple(info for info in infos if view in (info.view, f"{info.view}@{info.version}"))
        if not found:
            raise UnknownViewError(view, tuple(dict.fromkeys(f"{info.view}@{info.version}" for info in infos)))
        return found


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
        about |= {"tags": declared.tags, "owner": declared.owner, "features": list(declared.feature_names)}
    # As it comes back from the catalog, so that equal documents compare equal: tuples become lists.
    document: dict[str, Any] = orjson.loads(orjson.dumps({"meaning": declared.describe(), "about": about}))
    return document


def _steps(rows: CatalogReader, declared: DeclaredSet) -> Iterator[_Step]:
    for kind, items in _by_kind(declared).items():
        stored: dict[str, list[DefinitionRow]] = {}
        for row in rows.definitions(kind, retired=True):
            stored.setdefault(row.name, []).append(row)
        for name, item in items.items():
            yield _step(kind, item, stored.get(name, []))
        for name, versions in stored.items():
            live = [row for row in versions if row.retired_us is None]
            if name not in items and live:
                yield _Step(Change(kind, name, live[-1].version, live[-1].version), None, live[-1])


def _step(kind: Kind, item: Declared, versions: list[DefinitionRow]) -> _Step:
    """What becomes of one declaration, given all that was ever registered under its name, by version."""
    live = next((row for row in versions if row.retired_us is None), None)
    newest = versions[-1] if versions else None
    last = live or newest
    if isinstance(item, FeatureView):
        version = item.version
    elif last is None or last.content_hash == item.content_hash:
        version = 1 if last is None else last.version
    else:
        version = versions[-1].version + 1
    meaning = _document(item)["meaning"]
    same = next((row for row in versions if row.version == version), None)
    differences = () if last is None else tuple(_differences(last.document["meaning"], meaning))
    if same is not None and same.content_hash != item.content_hash:
        details = tuple(_differences(same.document["meaning"], meaning))
        raise DefinitionConflictError(
            f"feature view {item.name}@{version}",
            details or ("another meaning",),
            f"Raise its version to {versions[-1].version + 1}, or take the change back",
        )
    if same is None and newest is not None and version < newest.version:
        raise DefinitionConflictError(
            f"feature view {item.name}",
            (f"version {newest.version} is registered and {version} never was",),
            f"Raise its version to {newest.version + 1}",
        )
    _check_fixed(kind, item.name, meaning, last)
    return _Step(Change(kind, item.name, version, None if live is None else live.version, differences), item, same)


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


def _planned(steps: Iterator[_Step] | list[_Step]) -> Plan:
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


def _infos(rows: CatalogReader) -> Iterator[FeatureInfo]:
    readers: dict[tuple[str, str], set[str]] = {}
    for model in rows.definitions("model"):
        for ref, _, feature in model.document["meaning"]["features"]:
            readers.setdefault((ref, feature), set()).add(model.name)
    for row in rows.definitions("view"):
        meaning, about = row.document["meaning"], row.document["about"]
        for feature in about["features"]:
            yield FeatureInfo(
                name=f"{row.name}__{feature}",
                view=row.name,
                version=row.version,
                type="float64",
                function=_function(meaning, feature),
                description=about["description"],
                tags=about["tags"],
                owner=about["owner"],
                entity=meaning["entity"],
                source=meaning["source"]["name"],
                created_us=row.created_us,
                used_by=tuple(sorted(readers.get((f"{row.name}@{row.version}", feature), ()))),
            )


def _function(meaning: Document, feature: str) -> str:
    if feature in meaning["derived"]:
        return f"derived from {', '.join(meaning['derived'][feature]['inputs'])}"
    how = meaning["features"][feature]
    what = f"{how['function']}({how['column'] or ''})"
    over = f" over {how['window']}" if how["window"] else " over all time"
    return what + over + (f" where {how['where']}" if how["where"] else "")


def _searchable(info: FeatureInfo) -> str:
    tags = (f"{key}:{value}" for key, value in info.tags.items())
    return " ".join((info.name, info.function, info.description, info.owner, info.entity, info.source, *tags)).lower()
