"""What users declare about models: labels, populations, gates and model specs. Pure.

A label looks forward and exactly: ``q ≤ event_time < q + horizon``. So an event at the
as-of instant is in the label and in no feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import pyarrow.compute as pc

from heliostat.clock import format_duration, parse_duration_us
from heliostat.errors import (
    DuplicateNameError,
    InvalidDefinitionError,
    UnknownModelError,
    UnknownSourceError,
    UnknownViewError,
)
from heliostat.features.aggregations import ColumnLike, Input, check_input
from heliostat.features.definitions import (
    Entity,
    EventSource,
    FeatureRef,
    FeatureView,
    check_name,
    content_hash,
    request_types,
)
from heliostat.features.request import RequestTypes

LabelKind = Literal["none", "any", "sum"]
Objective = Literal["binary", "regression"]


class Label:
    """What is to be predicted, from events after the as-of instant.

    Use `none_within`, `any_within` or `sum_within`.

    Args:
        name: Identifier.
        source: Where the events come from.
        kind: ``none``: 1 if there is no event; ``any``: 1 if there is one; ``sum``: the sum of a column.
        within: The horizon, such as ``"90d"``.
        column: What is summed.
        where: Only events that meet this expression count.
        description: One line for the registry.

    Raises:
        DefinitionError: If a column, expression or duration can't be used.
    """

    def __init__(
        self,
        name: str,
        source: EventSource,
        *,
        kind: LabelKind,
        within: str,
        column: ColumnLike | None = None,
        where: pc.Expression | None = None,
        description: str = "",
    ) -> None:
        self.name = check_name(name, "Label")
        at = f"label {name!r}"
        if kind not in ("none", "any", "sum"):
            raise InvalidDefinitionError(at, f"kind {kind!r} is unknown", "use none_within, any_within or sum_within")
        if (kind == "sum") != (column is not None):
            raise InvalidDefinitionError(at, "a column goes with a sum, and only with it", "use Label.sum_within")
        self.source, self.kind, self.column, self.where = source, kind, column, where
        self.horizon_us = parse_duration_us(within)
        self.description = description
        check_input(self.input, source.schema, at=at)

    @classmethod
    def none_within(
        cls,
        name: str,
        source: EventSource,
        within: str,
        *,
        where: pc.Expression | None = None,
        description: str = "",
    ) -> Label:
        """1 if no event happens within the horizon, else 0: churn."""
        return cls(name, source, kind="none", within=within, where=where, description=description)

    @classmethod
    def any_within(
        cls,
        name: str,
        source: EventSource,
        within: str,
        *,
        where: pc.Expression | None = None,
        description: str = "",
    ) -> Label:
        """1 if at least one event happens within the horizon, else 0: conversion."""
        return cls(name, source, kind="any", within=within, where=where, description=description)

    @classmethod
    def sum_within(
        cls,
        name: str,
        source: EventSource,
        column: ColumnLike,
        within: str,
        *,
        where: pc.Expression | None = None,
        description: str = "",
    ) -> Label:
        """The sum of a column within the horizon: spend. Null, NaN and ±Inf are skipped."""
        return cls(name, source, kind="sum", within=within, column=column, where=where, description=description)

    @property
    def input(self) -> Input:
        """What it looks at."""
        return Input(self.column, self.where)

    def describe(self) -> dict[str, Any]:
        """A JSON document with all that its values depend on."""
        return {
            "name": self.name,
            "source": self.source.describe(),
            "kind": self.kind,
            "horizon": format_duration(self.horizon_us),
            "column": None if self.column is None else str(self.column),
            "where": None if self.where is None else str(self.where),
        }

    @property
    def content_hash(self) -> str:
        """Changes if and only if the meaning does."""
        return content_hash(self.describe())


@dataclass(frozen=True)
class Population:
    """Which entities get a row at an as-of instant.

    Attributes:
        active_within: Only those with an event in so long before it; None: with any event before it.
    """

    active_within: str | None = None

    def __post_init__(self) -> None:
        if self.active_within is not None:
            parse_duration_us(self.active_within)

    @property
    def active_within_us(self) -> int | None:
        """The same in microseconds."""
        return None if self.active_within is None else parse_duration_us(self.active_within)


@dataclass(frozen=True)
class Gate:
    """What a candidate must show before it may be promoted.

    Attributes:
        min_metric: The lower end of the metric's 95 % interval must reach this.
        max_regression: How much worse than production, on the same rows, the lower end of the paired
            difference may be.
        max_calibration_error: Expected calibration error at most this (binary objectives).
        max_latency_ms: Median of scoring one row, milliseconds, at most this.
        max_parity_mismatch: What production was served lately must be what training would have seen: the share
            of any feature's values that differ, by the newest parity check; None: isn't asked.
    """

    min_metric: float | None = None
    max_regression: float = 0.02
    max_calibration_error: float | None = 0.1
    max_latency_ms: float | None = 20.0
    max_parity_mismatch: float | None = None

    def describe(self) -> dict[str, float | None]:
        """A JSON document; what nobody asks for isn't in it, so that a model of an earlier release stays the same."""
        document = asdict(self)
        if self.max_parity_mismatch is None:
            del document["max_parity_mismatch"]
        return document


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A model: what it sees, what it predicts, how it is searched for and when it may serve.

    Attributes:
        name: Identifier.
        entity: What it predicts about.
        features: Views (all of their features) and single features ``view["feature"]``, in order.
        label: What it predicts.
        objective: ``binary`` or ``regression``.
        metric: What training and the gate look at: ``auc``, ``average_precision``, ``log_loss``; ``rmse``, ``mae``.
        params: Fixed LightGBM parameters.
        search_space: LightGBM parameter -> choices, or ``(low, high)`` for a range (logarithmic if both are above 0).
        population: Which entities get a row.
        gate: What a candidate must show.
        description: One line for the registry.
    """

    name: str
    entity: Entity
    features: Sequence[FeatureView | FeatureRef]
    label: Label
    objective: Objective = "binary"
    metric: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    search_space: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    population: Population = field(default_factory=Population)
    gate: Gate = field(default_factory=Gate)
    description: str = ""

    def __post_init__(self) -> None:
        check_name(self.name, "ModelSpec")
        at = f"model {self.name!r}"
        self._check_features(at)
        if self.objective not in ("binary", "regression"):
            raise InvalidDefinitionError(at, f"objective {self.objective!r} is unknown", "use binary or regression")
        if self.objective == "binary" and self.label.kind == "sum":
            raise InvalidDefinitionError(at, "a sum is no binary label", 'set objective="regression"')
        known = _METRICS[self.objective]
        if self.metric and self.metric not in known:
            raise InvalidDefinitionError(at, f"metric {self.metric!r} is unknown", f"use one of {', '.join(known)}")
        if not self.metric:
            object.__setattr__(self, "metric", known[0])

    def _check_features(self, at: str) -> None:
        fix = "name views, or features as view['feature']"
        if not self.features:
            raise InvalidDefinitionError(at, "it has no features", fix)
        for each in self.features:
            if not isinstance(each, FeatureView | FeatureRef):
                raise InvalidDefinitionError(at, f"{each!r} is no feature", fix)
        for view in self.views:
            versions = sorted({each.version for each in self.views if each.name == view.name})
            if len(versions) > 1:
                problem = f"it reads versions {versions} of view {view.name!r}"
                raise InvalidDefinitionError(at, problem, "a model reads one version of a view: choose it")
        names = [ref.name for ref in self.feature_refs]
        for name in names:
            if names.count(name) > 1:
                raise DuplicateNameError("feature", name, at)
        request_types(self.feature_refs)  # names that two views take as two types are refused
        for view in self.views:
            if view.entity.name != self.entity.name:
                problem = f"view {view.name!r} describes {view.entity.name!r}, not {self.entity.name!r}"
                raise InvalidDefinitionError(at, problem, "use views of its own entity")
        if self.entity.name not in {each.name for each in self.label.source.entities}:
            problem = f"label {self.label.name!r} isn't about {self.entity.name!r}"
            raise InvalidDefinitionError(at, problem, "take a label of a source that is")

    @property
    def feature_refs(self) -> tuple[FeatureRef, ...]:
        """The features, one by one, in order."""
        refs: list[FeatureRef] = []
        for each in self.features:
            refs.extend(each) if isinstance(each, FeatureView) else refs.append(each)
        return tuple(refs)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Qualified names, in the order of the model's matrix."""
        return tuple(ref.name for ref in self.feature_refs)

    @property
    def pinned_names(self) -> tuple[str, ...]:
        """The same with the views' versions: ``view@version__feature``."""
        return tuple(f"{ref.view.ref}__{ref.feature}" for ref in self.feature_refs)

    @property
    def views(self) -> tuple[FeatureView, ...]:
        """The views it reads, each once, in order."""
        return tuple({ref.view.ref: ref.view for ref in self.feature_refs}.values())

    @cached_property
    def categorical(self) -> tuple[str, ...]:
        """Qualified names of the features that are categories."""
        return tuple(ref.name for ref in self.feature_refs if ref.feature in ref.view.categorical)

    @cached_property
    def inputs(self) -> RequestTypes:
        """What a request for a prediction has to bring, and a spine to train on: type by name."""
        return request_types(self.feature_refs)

    def describe(self) -> dict[str, Any]:
        """A JSON document with all that a trained version depends on."""
        return {
            "name": self.name,
            "entity": self.entity.describe(),
            "features": [[ref.view.ref, ref.view.content_hash, ref.feature] for ref in self.feature_refs],
            "label": self.label.describe(),
            "objective": self.objective,
            "metric": self.metric,
            "params": dict(self.params),
            "search_space": {name: list(values) for name, values in self.search_space.items()},
            "population": asdict(self.population),
            "gate": self.gate.describe(),
        }

    @property
    def content_hash(self) -> str:
        """Changes if and only if the meaning does."""
        return content_hash(self.describe())


_METRICS: Mapping[str, tuple[str, ...]] = {
    "binary": ("auc", "average_precision", "log_loss"),
    "regression": ("rmse", "mae"),
}


def _referred(declared: object) -> tuple[Any, ...]:
    """The declarations that one refers to."""
    match declared:
        case EventSource():
            return declared.entities
        case FeatureView():
            return declared.source, declared.entity
        case Label():
            return (declared.source,)
        case ModelSpec():
            return declared.entity, declared.label, *declared.views
        case _:
            return ()


def _identity(declared: Any) -> str:  # noqa: ANN401 - any declaration
    return str(declared.ref if isinstance(declared, FeatureView) else declared.name)


@dataclass(frozen=True)
class Definitions:
    """Everything that a use case declares, by name.

    Attributes:
        entities: Entities.
        sources: Event sources.
        views: Feature views by reference, ``name@version``: versions of a view may be declared side by side.
        labels: Labels.
        models: Model specs.
    """

    entities: Mapping[str, Entity]
    sources: Mapping[str, EventSource]
    views: Mapping[str, FeatureView]
    labels: Mapping[str, Label]
    models: Mapping[str, ModelSpec]

    @classmethod
    def of(cls, declared: Sequence[object], *, merge: bool = False) -> Definitions:
        """Collect declarations; what they refer to is taken along.

        Args:
            declared: Any objects, such as the values of a module; others than declarations are passed over.
            merge: Of declarations that mean the same the first stays; otherwise they are refused too.

        Raises:
            DuplicateNameError: If two different declarations of one kind share a name, or two views also
                a version.
        """
        entities: dict[str, Entity] = {}
        sources: dict[str, EventSource] = {}
        views: dict[str, FeatureView] = {}
        labels: dict[str, Label] = {}
        models: dict[str, ModelSpec] = {}

        kinds: dict[type, tuple[str, dict[str, Any]]] = {
            Entity: ("entity", entities),
            EventSource: ("event source", sources),
            FeatureView: ("feature view", views),
            Label: ("label", labels),
            ModelSpec: ("model", models),
        }

        def place(each: object) -> tuple[str, dict[str, Any]]:
            return next(found for kind, found in kinds.items() if isinstance(each, kind))

        waiting: list[Any] = [each for each in declared if isinstance(each, tuple(kinds))]
        while waiting:
            each = waiting.pop(0)
            kind, known = place(each)
            same = known.setdefault(_identity(each), each)
            if same is not each and not (merge and same.content_hash == each.content_hash):
                raise DuplicateNameError(kind, _identity(each), "the definitions module")
            waiting.extend(part for part in _referred(each) if place(part)[1].get(_identity(part)) is not part)
        return cls(entities, sources, views, labels, models)

    def view(self, name: str) -> FeatureView:
        """The view of a reference ``name@version``; of a bare name, its highest version.

        Raises:
            UnknownViewError: Naming those that are declared.
        """
        versions = {view.version: view for view in self.views.values() if name in (view.name, view.ref)}
        if not versions:
            raise UnknownViewError(name, tuple(self.views))
        return versions[max(versions)]

    def lookup_names(self, pinned: Sequence[str]) -> tuple[str, ...]:
        """Names ``view@version__feature``, shortened to ``view__feature`` where that version is the highest.

        So equal features have equal names, and whatever reads the highest versions alone never sees a pinned one.
        """
        newest = {self.view(view.name).ref: view.name for view in self.views.values()}
        parts = (name.partition("__") for name in pinned)
        return tuple(f"{newest.get(view, view)}__{feature}" for view, _, feature in parts)

    def source(self, name: str) -> EventSource:
        """The event source of a name.

        Raises:
            UnknownSourceError: Naming those that are declared.
        """
        if name not in self.sources:
            raise UnknownSourceError(name, tuple(self.sources))
        return self.sources[name]

    def model(self, name: str | None = None) -> ModelSpec:
        """The model of a name; without a name, the only one.

        Raises:
            UnknownModelError: Naming those that are declared.
        """
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None or name not in self.models:
            raise UnknownModelError(name or "(none named)", tuple(self.models))
        return self.models[name]
