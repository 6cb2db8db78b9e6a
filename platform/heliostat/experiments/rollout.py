"""How a model's route changes: one version for everybody, a split of two, and back.

The catalog's newest routing document is the state, so a rollout can be taken up by any process
at any time. Each step is checked against that state and appended by compare-and-swap; then the
document is published to where requests read it. Publishing is repeated until what was published
is the newest, so that of two racing processes the later one wins in both places; after a crash
in between, `Rollout.publish` (or the next step) mends it.

        serve ──► single ──start_split──► split ──widen──► split
                    ▲                       │
                    └────────── stop ◄──────┘
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, Literal

from heliostat.clock import Clock
from heliostat.errors import RolloutError, UnknownModelError, UnknownVersionError
from heliostat.experiments.assignment import N_SLOTS, RoutingDocument, Variant
from heliostat.storage.catalog import Catalog, CatalogReader
from heliostat.storage.catalog_tables import RouteRow

CONTROL: Final = "control"
CHALLENGER: Final = "challenger"

Publish = Callable[[str, bytes], object]
"""Puts a model's routing document where requests read it: ``publish(model, document)``."""
Promote = Callable[[int, Mapping[str, Any]], object]
"""Makes a version the one in production: ``promote(version, evidence)``; repeating it does no harm."""
_Step = Callable[[RoutingDocument | None, CatalogReader], RoutingDocument]


class Rollout:
    """Changes routes.

    Args:
        catalog: Where routes are kept.
        clock: Tells when they changed.
        publish: Puts a document where requests read it.
    """

    def __init__(self, catalog: Catalog, clock: Clock, publish: Publish) -> None:
        self._catalog, self._clock, self._publish = catalog, clock, publish

    def current(self, model: str) -> RoutingDocument | None:
        """A model's route, or None if it has none yet."""
        with self._catalog.read() as rows:
            return _current(rows, model)

    def history(self, model: str) -> tuple[RouteRow, ...]:
        """Every route that a model has had, oldest first."""
        with self._catalog.read() as rows:
            return rows.route_history(model)

    def serve(
        self,
        model: str,
        version: int,
        *,
        reason: str,
        shadow: tuple[int, ...] = (),
        end_split: bool = False,
        expected_revision: int | None = None,
    ) -> RoutingDocument:
        """Let one version serve everybody, as after a promotion or a rollback.

        Args:
            model: The model's name.
            version: The version that answers.
            reason: Why, in a sentence.
            shadow: Versions that are scored and logged, but don't answer.
            end_split: Whether a running split may be ended by this; a rollback says yes.
            expected_revision: At which revision the caller saw the route, 0 if none; None: any.

        Raises:
            UnknownVersionError: If there is no such version.
            RolloutError: If a split is running, or the route isn't at ``expected_revision``.
        """

        def step(found: RoutingDocument | None, _: CatalogReader) -> RoutingDocument:
            if found is not None and found.is_split and not end_split:
                raise RolloutError(
                    model, f"serve version {version} alone", f"{_told(found)} is running", "stop the split first"
                )
            return RoutingDocument.single(model, version, revision=_next(found), shadow=shadow)

        return self._change(model, "serve one version", step, reason, expected_revision)

    def start_split(
        self,
        model: str,
        *,
        experiment: str,
        control: int,
        challenger: int,
        weight: float,
        coverage: float = 1.0,
        reason: str = "",
        expected_revision: int | None = None,
    ) -> RoutingDocument:
        """Let a challenger serve a share of the entities.

        Args:
            model: The model's name.
            experiment: A name that the model hasn't used before: it decides who gets what.
            control: The version that serves now.
            challenger: The version that is tried.
            weight: The challenger's share of the experiment, in (0, 1).
            coverage: Share of all entities that are in the experiment, in (0, 1]; see `widen`.
            reason: Why, in a sentence.
            expected_revision: At which revision the caller saw the route, 0 if none; None: any.

        Raises:
            UnknownVersionError: If there is no such version.
            RolloutError: If a split is running, the control isn't what serves, or the name was used before.
        """

        def step(found: RoutingDocument | None, rows: CatalogReader) -> RoutingDocument:
            doing, salt = f"start split {experiment!r}", f"{model}/{experiment}"
            if found is not None and found.is_split:
                raise RolloutError(model, doing, f"{_told(found)} is running", "stop it first")
            if found is not None and found.control.version != control:
                state = f"version {found.control.version} serves, not {control}"
                raise RolloutError(model, doing, state, "take the version that serves as control")
            if control == challenger:
                raise RolloutError(model, doing, f"version {control} is both arms", "name two versions")
            if not 0.0 < weight < 1.0:
                raise RolloutError(
                    model, doing, f"the challenger's weight is {weight:g}", "keep it above 0 and below 1"
                )
            if round(weight * N_SLOTS) in (0, N_SLOTS):
                state = f"the challenger's weight is {weight:g}, and splits go in steps of 0.01 %"
                raise RolloutError(model, doing, state, "take at least 0.0001, and at most 0.9999")
            if salt in {str(row.document["salt"]) for row in rows.route_history(model)}:
                fix = "choose another name: the same name would pick the same entities again"
                raise RolloutError(model, doing, "an earlier split had that name", fix)
            arms = (Variant(CONTROL, control, 1.0 - weight), Variant(CHALLENGER, challenger, weight))
            return RoutingDocument(model, _next(found), salt, coverage, arms)

        return self._change(model, "start a split", step, reason or f"experiment {experiment}", expected_revision)

    def widen(
        self, model: str, coverage: float, *, reason: str = "", expected_revision: int | None = None
    ) -> RoutingDocument:
        """Take more entities into the running split; nobody who is in it changes sides.

        Raises:
            RolloutError: If no split is running, or it covers more already.
        """

        def step(found: RoutingDocument | None, _: CatalogReader) -> RoutingDocument:
            split = _split(model, "widen a split", found)
            if coverage < split.coverage:
                state = f"it covers {split.coverage:g} already"
                raise RolloutError(model, f"narrow its split to {coverage:g}", state, "stop it and start another")
            return replace(split, revision=_next(found), coverage=coverage)

        return self._change(model, "widen a split", step, reason or f"coverage {coverage:g}", expected_revision)

    def stop(
        self,
        model: str,
        *,
        keep: Literal["control", "challenger"] = CONTROL,
        reason: str,
        evidence: Mapping[str, Any] | None = None,
        promote: Promote | None = None,
        expected_revision: int | None = None,
    ) -> RoutingDocument:
        """End the running split: one of its arms serves everybody.

        If the challenger is kept, it is promoted first. A crash in between leaves the split running,
        and stopping it again completes it.

        Args:
            model: The model's name.
            keep: The arm that stays.
            reason: Why, in a sentence.
            evidence: What the experiment has shown; goes with the promotion.
            promote: Makes a version the one in production; needed to keep the challenger.
            expected_revision: At which revision the caller saw the route; None: any.

        Raises:
            RolloutError: If no split is running, or nothing is there to promote with.
            HeliostatError: What ``promote`` raises; the split then goes on.
        """
        split = _split(model, "stop a split", self.current(model))
        _check_revision(model, "stop a split", split, expected_revision)
        kept = next(variant for variant in split.variants if variant.name == keep)
        if keep == CHALLENGER:
            if promote is None:
                fix = "give it the registry's promote"
                raise RolloutError(model, "keep the challenger", "it isn't promoted yet", fix)
            promote(kept.version, {"experiment": split.to_document(), **(evidence or {})})

        def step(found: RoutingDocument | None, _: CatalogReader) -> RoutingDocument:
            return RoutingDocument.single(model, kept.version, revision=_next(found))

        return self._change(model, "stop a split", step, reason, split.revision)

    def publish(self, model: str) -> RoutingDocument:
        """Publish a model's route again, as after the online store was lost.

        Raises:
            RolloutError: If the model has no route yet.
        """
        published: RoutingDocument | None = None
        while (newest := self.current(model)) != published:
            if newest is None:
                break
            self._publish(model, newest.to_bytes())
            published = newest
        if published is None:
            raise RolloutError(model, "publish its route", "it has none yet", "promote a version first")
        return published

    def _change(
        self, model: str, doing: str, step: _Step, reason: str, expected_revision: int | None
    ) -> RoutingDocument:
        with self._catalog.write() as rows:
            found = _current(rows, model)
            _check_revision(model, doing, found, expected_revision)
            changed = step(found, rows)
            _check_versions(rows, changed)
            rows.add_route(RouteRow(model, changed.revision, changed.to_document(), reason, self._clock.now_us()))
        return self.publish(model)


def _current(rows: CatalogReader, model: str) -> RoutingDocument | None:
    row = rows.route(model)
    return None if row is None else RoutingDocument.from_document(row.document)


def _next(found: RoutingDocument | None) -> int:
    return 1 if found is None else found.revision + 1


def _check_revision(model: str, doing: str, found: RoutingDocument | None, expected: int | None) -> None:
    revision = 0 if found is None else found.revision
    if expected is not None and revision != expected:
        state = f"its route is at revision {revision}, not {expected}"
        raise RolloutError(model, doing, state, "somebody changed it: look again and repeat if it still holds")


def _split(model: str, doing: str, found: RoutingDocument | None) -> RoutingDocument:
    if found is None or not found.is_split:
        state = "it has no route yet" if found is None else f"version {found.control.version} serves everybody"
        raise RolloutError(model, doing, state, "start a split first")
    return found


def _told(document: RoutingDocument) -> str:
    arms = ", ".join(f"{v.name} version {v.version} at {v.weight:g}" for v in document.variants)
    return f"a split ({arms})"


def _check_versions(rows: CatalogReader, document: RoutingDocument) -> None:
    known = rows.version_numbers(document.model)
    if not known:
        raise UnknownModelError(document.model, rows.models())
    for version in document.versions:
        if version not in known:
            raise UnknownVersionError(document.model, str(version), tuple(str(number) for number in known))
