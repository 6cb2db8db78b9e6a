"""What is known about a feature: what it means, where it comes from, who answers for it and who reads it.

All of it is read off the catalog: what was registered, which models are declared to read it, and
which model versions were trained on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from heliostat.clock import format_instant
from heliostat.features.definitions import FeatureView
from heliostat.features.offline import columns_read
from heliostat.storage.catalog import CatalogReader

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FeatureMetadata:
    """What the registry knows about one feature of one version of a view.

    Attributes:
        name: Qualified: ``view__feature``.
        view: The view's name.
        version: The view's version.
        type: Of its values: ``float64``, or ``category``: the code of a text.
        function: Such as ``Sum(amount) over 30d``, or ``derived from …``.
        description: Its own, or the view's if it has none.
        tags: The view's.
        owner: The view's.
        entity: What it describes.
        source: Where its events come from.
        columns: Which of the source's columns its values depend on, in the schema's order; keys left out.
        request: What a request has to bring for it.
        created_us: When this version of the view was registered.
        used_by: Models that are declared to read it, sorted.
        versions: Model versions that were trained on it, ``model@version``.
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
    columns: tuple[str, ...]
    request: tuple[str, ...]
    created_us: int
    used_by: tuple[str, ...]
    versions: tuple[str, ...]

    @property
    def ref(self) -> str:
        """``view@version__feature``: this one, whatever other versions there are."""
        return f"{self.view}@{self.version}__{self.name.partition('__')[2]}"

    @property
    def searchable(self) -> str:
        """All that a search looks at, in lower case."""
        tags = (f"{key}:{value}" for key, value in self.tags.items())
        columns = (f"{self.source}.{column}" for column in self.columns)
        about = (self.description, self.owner, self.entity, self.source, *tags, *columns, *self.used_by)
        return " ".join((self.ref, self.name, self.function, self.type, *about)).lower()

    def to_document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "name": self.name,
            "ref": self.ref,
            "view": self.view,
            "version": self.version,
            "type": self.type,
            "function": self.function,
            "description": self.description,
            "tags": dict(self.tags),
            "owner": self.owner,
            "entity": self.entity,
            "source": self.source,
            "columns": list(self.columns),
            "request": list(self.request),
            "created": format_instant(self.created_us),
            "used_by": list(self.used_by),
            "versions": list(self.versions),
        }


_UNSAID: Final[Document] = {"description": "", "columns": (), "request": (), "type": "float64"}


def about_view(view: FeatureView) -> dict[str, Any]:
    """What the catalog keeps of a view beside its meaning: none of it enters the content hash."""
    features: dict[str, Any] = {}
    for feature in view.feature_names:
        base = [view.base_features[name] for name in view.needed([feature]) if name in view.base_features]
        read = {view.source.event_time, *columns_read([each.input for each in base], view.source.schema)}
        own = view.base_features.get(feature)
        function = None if own is not None else view.derived_features[feature].function
        features[feature] = {
            "description": own.description if own is not None else _first_line(function.__doc__),
            "columns": [column for column in view.source.schema.names if column in read],
            "request": list(view.request_of([feature])),
            "type": "category" if feature in view.categorical else "float64",
        }
    return {"tags": view.tags, "owner": view.owner, "features": features}


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def all_metadata(rows: CatalogReader) -> Iterator[FeatureMetadata]:
    """Every registered feature, by view and version, in declared order within it."""
    declared = _declared_readers(rows)
    trained = _trained_readers(rows)
    for row in rows.definitions("view"):
        meaning, about = row.document["meaning"], row.document["about"]
        kept = about["features"]  # a list of names, where an early release wrote it
        for feature, own in (kept if isinstance(kept, Mapping) else dict.fromkeys(kept, _UNSAID)).items():
            place = f"{row.name}@{row.version}", feature
            yield FeatureMetadata(
                name=f"{row.name}__{feature}",
                view=row.name,
                version=row.version,
                type=own["type"],
                function=_function(meaning, feature),
                description=own["description"] or about["description"],
                tags=about["tags"],
                owner=about["owner"],
                entity=meaning["entity"],
                source=meaning["source"]["name"],
                columns=tuple(own["columns"]),
                request=tuple(own["request"]),
                created_us=row.created_us,
                used_by=tuple(sorted(declared.get(place, ()))),
                versions=tuple(trained.get(place, ())),
            )


def _declared_readers(rows: CatalogReader) -> dict[tuple[str, str], set[str]]:
    """Names of models by what they are declared to read: a view's reference and a feature."""
    readers: dict[tuple[str, str], set[str]] = {}
    for model in rows.definitions("model"):
        for ref, _, feature in model.document["meaning"]["features"]:
            readers.setdefault((ref, feature), set()).add(model.name)
    return readers


def _trained_readers(rows: CatalogReader) -> dict[tuple[str, str], list[str]]:
    """Model versions by what they were trained on."""
    readers: dict[tuple[str, str], list[str]] = {}
    for model in rows.models():
        for version in rows.versions(model):
            refs = {ref.partition("@")[0]: ref for ref in version.lineage.get("view_hashes", {})}
            for name, _ in version.signature.get("features", ()):
                view, _, feature = name.partition("__")
                if view in refs:
                    readers.setdefault((refs[view], feature), []).append(f"{model}@{version.version}")
    return readers


def serving_readers(rows: CatalogReader) -> dict[str, list[str]]:
    """Who has to be able to read each view: by its reference, versions with an alias or in a routing document."""
    readers: dict[str, list[str]] = {}
    for model in rows.models():
        why: dict[int, list[str]] = {}
        for alias in rows.aliases(model):
            why.setdefault(alias.version, []).append(alias.alias)
        route = rows.route(model)
        if route is not None:
            for version in (*(each["version"] for each in route.document["variants"]), *route.document["shadow"]):
                why.setdefault(version, ["in the routing document"])
        for number, reasons in sorted(why.items()):
            version_row = rows.version(model, number)
            for ref in () if version_row is None else version_row.lineage.get("view_hashes", {}):
                readers.setdefault(ref, []).append(f"model {model!r} version {number} ({', '.join(reasons)})")
    return readers


_EVERY_FUNCTION: Final = ("function", "column", "where", "window", "hop")


def _function(meaning: Document, feature: str) -> str:
    if feature in meaning["derived"]:
        return f"derived from {', '.join(meaning['derived'][feature]['inputs'])}"
    how = meaning["features"][feature]
    settings = (f"{name}={value}" for name, value in how.items() if name not in _EVERY_FUNCTION)
    what = f"{how['function']}({', '.join([*([how['column']] if how['column'] else []), *settings])})"
    over = f" over {how['window']}" if how["window"] else " over all time"
    return what + over + (f" where {how['where']}" if how["where"] else "")
