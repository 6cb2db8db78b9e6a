from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from heliostat.clock import ManualClock
from heliostat.errors import DefinitionConflictError, UnknownViewError, ViewInUseError
from heliostat.features.aggregations import Aggregation, Count, Sum
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.features.registry import FeatureRegistry, Plan
from heliostat.models.definitions import Definitions, Label, ModelSpec
from heliostat.schema import TIMESTAMP
from heliostat.storage.catalog import Catalog
from heliostat.storage.catalog_tables import AliasRow, RouteRow, VersionRow

COLUMNS = [("customer_id", pa.int64()), ("at", TIMESTAMP), ("id", pa.string()), ("amount", pa.float64())]


def _declared(
    *,
    key: str = "int64",
    columns: list[tuple[str, pa.DataType]] = COLUMNS,
    version: int = 1,
    features: dict[str, Aggregation] | None = None,
    owner: str = "growth",
    horizon: str = "90d",
    view: str = "behaviour",
) -> Definitions:
    customer = Entity("customer", keys={"customer_id": key})  # type: ignore[dict-item]
    columns = [(name, pa.string() if (name, key) == ("customer_id", "string") else dtype) for name, dtype in columns]
    purchases = EventSource(
        "purchases", schema=pa.schema(columns), entity=customer, event_time="at", event_id="id", description="tills"
    )
    behaviour = FeatureView(
        view,
        version=version,
        source=purchases,
        features=features or {"visits": Count(window="30d"), "spend": Sum("amount", window="30d")},
        owner=owner,
        tags={"team": "crm"},
        description="What a customer does",
    )

    @behaviour.derived
    def spend_a_visit(spend: NDArray[np.float64], visits: NDArray[np.float64]) -> NDArray[np.float64]:
        return spend / visits

    label = Label.none_within("churned", purchases, horizon)
    return Definitions.of([behaviour, ModelSpec("churn", customer, [behaviour["spend"]], label)])


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1_000_000)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.open(f"sqlite:///{tmp_path}/catalog.db") as opened:
        yield opened


@pytest.fixture
def registry(catalog: Catalog, clock: ManualClock) -> FeatureRegistry:
    return FeatureRegistry(catalog, clock)


def _names(plan: Plan) -> dict[str, list[str]]:
    groups = {"added": plan.added, "changed": plan.changed, "removed": plan.removed, "unchanged": plan.unchanged}
    return {
        name: [f"{change.kind} {change.name}@{change.version}" for change in changes]
        for name, changes in groups.items()
        if changes
    }


EVERYTHING = ["entity customer@1", "source purchases@1", "view behaviour@1", "label churned@1", "model churn@1"]


# ── Plan and apply ──────────────────────────────────────────────────────────────────


def test_a_plan_changes_nothing(registry: FeatureRegistry) -> None:
    assert _names(registry.plan(_declared())) == {"added": EVERYTHING}
    assert registry.list() == ()
    assert _names(registry.apply(_declared())) == {"added": EVERYTHING}


def test_applying_again_changes_nothing(registry: FeatureRegistry, clock: ManualClock) -> None:
    registry.apply(_declared())
    before = registry.list()
    clock.advance(1)
    assert _names(registry.plan(_declared())) == {"unchanged": EVERYTHING}
    assert registry.apply(_declared()).is_empty
    assert registry.list() == before


def test_a_changed_view_under_the_same_version_is_refused_with_the_difference(registry: FeatureRegistry) -> None:
    registry.apply(_declared())
    changed = _declared(features={"visits": Count(window="60d"), "spend": Sum("amount", window="30d")})
    with pytest.raises(DefinitionConflictError, match=r"behaviour@1.*visits\.window was '30d' and is '60d'.*to 2"):
        registry.plan(changed)


def test_a_refused_set_registers_nothing(registry: FeatureRegistry) -> None:
    registry.apply(_declared())
    before = registry.list()
    with pytest.raises(DefinitionConflictError):
        registry.apply(_declared(features={"visits": Count(window="60d"), "spend": Sum("amount")}, horizon="30d"))
    assert registry.list() == before


def test_a_changed_view_under_a_higher_version_replaces_the_old_one(registry: FeatureRegistry) -> None:
    registry.apply(_declared())
    changed = _declared(version=2, features={"spend": Sum("amount", window="30d"), "visits": Count()})
    plan = registry.apply(changed)
    assert _names(plan)["changed"] == ["view behaviour@2", "model churn@2"]
    assert plan.changed[0].previous == 1
    assert "features.visits.window was '30d' and is None" in plan.changed[0].differences
    assert [(row.name, row.version) for row in registry.list("view")] == [("behaviour", 2)]


def test_a_version_that_was_left_may_be_taken_back_unchanged(registry: FeatureRegistry) -> None:
    registry.apply(_declared())
    registry.apply(_declared(version=2))
    assert "view behaviour@1" in _names(registry.apply(_declared()))["changed"]
    assert [row.version for row in registry.list("view")] == [1]


def test_a_lower_version_that_never_was_is_refused(registry: FeatureRegistry) -> None:
    registry.apply(_declared(version=3))
    with pytest.raises(DefinitionConflictError, match=r"version 3 is registered and 2 never was.*to 4"):
        registry.plan(_declared(version=2))


def test_what_is_no_longer_declared_is_retired_and_can_come_back(registry: FeatureRegistry) -> None:
    registry.apply(_declared())
    assert _names(registry.apply(_declared(view="habits")))["removed"] == ["view behaviour@1"]
    assert [row.name for row in registry.list("view")] == ["habits"]
    assert "view behaviour@1" in _names(registry.apply(_declared()))["added"]
    assert [row.name for row in registry.list("view")] == ["behaviour"]


def test_a_view_that_comes_back_means_the_same_or_has_a_higher_version(registry: FeatureRegistry) -> None:
    registry.apply(_declared())
    registry.apply(_declared(view="habits"))
    with pytest.raises(DefinitionConflictError, match="behaviour@1"):
        registry.apply(_declared(features={"visits": Count(), "spend": Sum("amount")}))


def test_a_changed_label_becomes_its_next_version(registry: FeatureRegistry) -> None:
    registry.apply(_declared())
    plan = registry.apply(_declared(horizon="30d"))
    assert _names(plan)["changed"] == ["label churned@2", "model churn@2"]
    assert plan.changed[0].differences == ("horizon was '90d' and is '30d'",)


def test_owner_tags_and_description_change_without_a_version(registry: FeatureRegistry, clock: ManualClock) -> None:
    registry.apply(_declared())
    clock.advance(1)
    assert _names(registry.apply(_declared(owner="retention")))["changed"] == ["view behaviour@1"]
    assert {info.owner for info in registry.features()} == {"retention"}
    assert {info.created_us for info in registry.features()} == {1_000_000}


def test_an_entity_keeps_its_keys(registry: FeatureRegistry) -> None:
    registry.apply(_declared())
    with pytest.raises(DefinitionConflictError, match=r"entity 'customer'.*int64.*string.*another name"):
        registry.plan(_declared(key="string", version=2))


def test_a_source_may_gain_a_column_but_not_lose_one(registry: FeatureRegistry) -> None:
    registry.apply(_declared())
    more = [*COLUMNS, ("shop", pa.string())]
    assert "source purchases@2" in _names(registry.apply(_declared(columns=more, version=2)))["changed"]
    with pytest.raises(DefinitionConflictError, match=r"source 'purchases'.*shop"):
        registry.plan(_declared(version=3))


# ── Versions side by side ───────────────────────────────────────────────────────────


def _side_by_side() -> Definitions:
    """Version 2 of the view, which the model reads, beside version 1."""
    old, new = _declared(), _declared(version=2, features={"visits": Count(), "spend": Sum("amount", window="30d")})
    entity, source = new.entities["customer"], new.sources["purchases"]
    beside = FeatureView(
        "behaviour",
        version=1,
        source=source,
        entity=entity,
        features=dict(old.view("behaviour").base_features),
        owner="growth",
        tags={"team": "crm"},
        description="What a customer does",
    )
    beside.derived_features.update(old.view("behaviour").derived_features)
    return Definitions.of([beside, *new.views.values(), *new.models.values()])


def _serve(catalog: Catalog, alias: str, refs: Mapping[str, str]) -> None:
    """A version of the model that was trained on views, with an alias."""
    signature = {"format": 1, "features": [["behaviour__spend", "float64"]]}
    with catalog.write() as rows:
        version = len(rows.version_numbers("churn")) + 1
        rows.add_version(VersionRow("churn", version, "f" * 64, signature, {}, {"view_hashes": refs}, None, {}, 1))
        found = rows.alias("churn", alias)
        revision = 1 if found is None else found.revision + 1
        rows.add_alias_change(AliasRow("churn", alias, revision, version, None, "promote", "", {}, 1))


def test_a_new_version_may_stand_beside_the_old_one(registry: FeatureRegistry) -> None:
    registry.apply(_declared())
    plan = registry.apply(_side_by_side())
    added = plan.added[0]
    assert (added.ref, added.previous, added.beside) == ("behaviour@2", None, (1,))
    assert "features.visits.window was '30d' and is None" in added.differences
    assert "view behaviour@1" in _names(plan)["unchanged"]
    assert [(row.name, row.version) for row in registry.list("view")] == [("behaviour", 1), ("behaviour", 2)]
    assert registry.apply(_side_by_side()).is_empty


def test_each_version_keeps_its_own_metadata_and_readers(registry: FeatureRegistry) -> None:
    registry.apply(_side_by_side())
    found = {info.ref: (info.function, info.used_by) for info in registry.features("visits count")}
    assert found == {
        "behaviour@1__visits": ("Count() over 30d", ()),
        "behaviour@2__visits": ("Count() over all time", ()),
    }
    assert [info.version for info in registry.features("behaviour__spend sum")] == [1, 2]
    assert [info.used_by for info in registry.features("behaviour__spend sum")] == [(), ("churn",)]
    assert {info.version for info in registry.view("behaviour")} == {2}
    assert {info.version for info in registry.view("behaviour@1")} == {1}


def test_the_old_version_goes_once_it_is_declared_no_longer(registry: FeatureRegistry) -> None:
    registry.apply(_side_by_side())
    plan = registry.apply(_declared(version=2, features={"visits": Count(), "spend": Sum("amount", window="30d")}))
    assert _names(plan)["removed"] == ["view behaviour@1"]
    assert [(row.name, row.version) for row in registry.list("view")] == [("behaviour", 2)]


@pytest.mark.parametrize("alias", ["production", "staging", "shadow"])
def test_a_version_that_a_model_with_an_alias_reads_cant_go(
    registry: FeatureRegistry, catalog: Catalog, alias: str
) -> None:
    registry.apply(_side_by_side())
    _serve(catalog, alias, {"behaviour@1": "…"})
    without = _declared(version=2, features={"visits": Count(), "spend": Sum("amount", window="30d")})
    says = rf"behaviour@1 can't go: model 'churn' version 1 \({alias}\)"
    with pytest.raises(ViewInUseError, match=says):
        registry.plan(without)
    with pytest.raises(ViewInUseError, match=says):
        registry.apply(without)
    assert len(registry.list("view")) == 2
    _serve(catalog, alias, {"behaviour@2": "…"})
    assert _names(registry.apply(without))["removed"] == ["view behaviour@1"]


def test_replacing_a_version_that_is_served_is_refused_too(registry: FeatureRegistry, catalog: Catalog) -> None:
    registry.apply(_declared())
    _serve(catalog, "production", {"behaviour@1": "…"})
    with pytest.raises(ViewInUseError, match="Declare it beside the new version"):
        registry.apply(_declared(version=2))


def test_a_challenger_in_the_routing_document_keeps_its_views(registry: FeatureRegistry, catalog: Catalog) -> None:
    registry.apply(_declared())
    _serve(catalog, "tried", {"behaviour@1": "…"})
    _serve(catalog, "tried", {"behaviour@2": "…"})
    document = {"variants": [{"name": "a", "version": 2}, {"name": "b", "version": 1}], "shadow": []}
    with catalog.write() as rows:
        rows.add_route(RouteRow("churn", 1, document, "", 1))
    with pytest.raises(ViewInUseError, match="version 1 .in the routing document"):
        registry.apply(_declared(version=2))


def test_whatever_is_kept_stays_registered(registry: FeatureRegistry) -> None:
    registry.apply(_declared())
    plan = registry.apply(_declared(view="habits", version=1), keep=True)
    assert "removed" not in _names(plan)
    assert [row.name for row in registry.list("view")] == ["behaviour", "habits"]
    registry.apply(_declared(version=2), keep=True)
    assert [(row.name, row.version) for row in registry.list("view")] == [
        ("behaviour", 1),
        ("behaviour", 2),
        ("habits", 1),
    ]


def test_model_versions_that_were_trained_on_a_feature_are_named(registry: FeatureRegistry, catalog: Catalog) -> None:
    registry.apply(_side_by_side())
    _serve(catalog, "production", {"behaviour@1": "…"})
    by_ref = {info.ref: info.versions for info in registry.features("spend sum")}
    assert by_ref == {"behaviour@1__spend": ("churn@1",), "behaviour@2__spend": ()}


# ── Looking up ──────────────────────────────────────────────────────────────────────


def test_a_feature_is_described_with_who_uses_it(registry: FeatureRegistry) -> None:
    registry.apply(_declared())
    visits, spend, derived = registry.features()
    assert (visits.name, visits.used_by, visits.function) == ("behaviour__visits", (), "Count() over 30d")
    assert (spend.used_by, spend.function) == (("churn",), "Sum(amount) over 30d")
    assert derived.function == "derived from spend, visits"
    assert spend.to_document() == {
        "name": "behaviour__spend",
        "ref": "behaviour@1__spend",
        "view": "behaviour",
        "version": 1,
        "type": "float64",
        "function": "Sum(amount) over 30d",
        "description": "What a customer does",
        "tags": {"team": "crm"},
        "owner": "growth",
        "entity": "customer",
        "source": "purchases",
        "columns": ["at", "amount"],
        "request": [],
        "created": "1970-01-01T00:00:01Z",
        "used_by": ["churn"],
        "versions": [],
    }


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("spend", ["spend", "spend_a_visit"]),
        ("SPEND sum", ["spend"]),
        ("team:crm visits", ["visits", "spend_a_visit"]),
        ("growth customer", ["visits", "spend", "spend_a_visit"]),
        ("purchases.amount", ["spend", "spend_a_visit"]),
        ("weather", []),
    ],
)
def test_search_needs_all_words(registry: FeatureRegistry, text: str, found: list[str]) -> None:
    registry.apply(_declared())
    assert [info.name.removeprefix("behaviour__") for info in registry.features(text)] == found


def test_a_view_is_found_with_or_without_its_version(registry: FeatureRegistry) -> None:
    registry.apply(_declared())
    assert registry.view("behaviour") == registry.view("behaviour@1") == registry.features()
    with pytest.raises(UnknownViewError, match=r"'behaviour@2'.*behaviour@1"):
        registry.view("behaviour@2")
