from __future__ import annotations

from collections.abc import Callable

import pyarrow.compute as pc
import pytest

from configs.churn import definitions as churn
from heliostat import Count, Entity, EventSource, FeatureView, Label, ModelSpec, Population
from heliostat.errors import (
    DefinitionError,
    DuplicateNameError,
    ExpressionError,
    InvalidDefinitionError,
    UnknownColumnError,
    UnknownModelError,
    UnknownSourceError,
    UnknownViewError,
    WindowError,
)
from heliostat.models.definitions import Definitions, Gate


def spec(**changes: object) -> ModelSpec:
    arguments: dict = {"entity": churn.customer, "features": [churn.recent_purchases], "label": churn.churned}
    return ModelSpec("m", **{**arguments, **changes})


other = Entity("other", keys={"customer_id": "int64"})
other_events = EventSource(
    "others", schema=churn.purchases.schema, entity=other, event_time="purchased_at", event_id="event_id"
)


@pytest.mark.parametrize(
    ("declare", "error", "says"),
    [
        (lambda: Label.none_within("l", churn.purchases, "soon"), WindowError, "30d"),
        (lambda: Label.sum_within("l", churn.purchases, "price", "9d"), UnknownColumnError, "amount"),
        (lambda: Label.any_within("l", churn.purchases, "9d", where=pc.field("x") > 1), ExpressionError, "x"),
        (lambda: Label("l", churn.purchases, kind="sum", within="9d"), InvalidDefinitionError, "sum_within"),
        (lambda: spec(features=[]), InvalidDefinitionError, "no features"),
        (lambda: spec(features=["count_30d"]), InvalidDefinitionError, "view['feature']"),
        (
            lambda: spec(features=[churn.recent_purchases, churn.recent_purchases["count_30d"]]),
            DuplicateNameError,
            "recent_purchases__count_30d",
        ),
        (lambda: spec(entity=other), InvalidDefinitionError, "describes 'customer'"),
        (lambda: spec(label=Label.any_within("l", other_events, "9d")), InvalidDefinitionError, "isn't about"),
        (lambda: spec(objective="ranking"), InvalidDefinitionError, "binary or regression"),
        (lambda: spec(metric="rmse"), InvalidDefinitionError, "auc"),
        (
            lambda: spec(label=Label.sum_within("l", churn.purchases, "amount", "9d")),
            InvalidDefinitionError,
            "regression",
        ),
        (lambda: Population(active_within="ever"), WindowError, "30d"),
    ],
)
def test_a_declaration_that_does_not_fit_fails_at_once_and_says_why(
    declare: Callable[[], object], error: type[DefinitionError], says: str
) -> None:
    with pytest.raises(error) as caught:
        declare()
    assert says in str(caught.value)


def test_features_keep_their_order_and_qualified_names() -> None:
    model = spec(features=[churn.purchase_history["frequency"], churn.recent_purchases])
    assert model.feature_names[:2] == ("purchase_history__frequency", "recent_purchases__count_30d")
    assert [view.name for view in model.views] == ["purchase_history", "recent_purchases"]
    assert model.metric == "auc"


def test_a_use_case_is_collected_with_all_it_refers_to() -> None:
    found = Definitions.of([churn.churn])
    assert set(found.views) == {"recent_purchases@1", "purchase_history@1"}
    assert set(found.sources) == {"purchases"}
    assert set(found.entities) == {"customer"}
    assert set(found.labels) == {"churned"}
    assert found.model() is churn.churn
    assert found.view("recent_purchases@1") is found.view("recent_purchases")


def test_two_declarations_of_one_name_are_refused() -> None:
    with pytest.raises(DuplicateNameError, match="customer"):
        Definitions.of([churn.churn, Entity("customer", keys={"customer_id": "int64"})])


def test_what_is_not_declared_is_answered_with_what_is() -> None:
    found = Definitions.of([churn.churn])
    with pytest.raises(UnknownViewError, match="recent_purchases@1"):
        found.view("recent_purchases@2")
    with pytest.raises(UnknownSourceError, match="purchases"):
        found.source("clicks")
    with pytest.raises(UnknownModelError, match="churn"):
        found.model("fraud")


def test_the_content_hash_changes_with_the_meaning() -> None:
    models = [
        spec(),
        spec(params={"num_leaves": 3}),
        spec(features=[churn.purchase_history]),
        spec(label=Label.none_within("churned", churn.purchases, "60d")),
        spec(population=Population(active_within="90d")),
    ]
    assert len({model.content_hash for model in models}) == 5
    assert spec().content_hash == spec(description="words").content_hash


# ── Versions side by side ───────────────────────────────────────────────────────────


def _version(number: int, window: str = "30d") -> FeatureView:
    return FeatureView("recent", version=number, source=churn.purchases, features={"count": Count(window=window)})


def test_versions_of_a_view_stand_side_by_side_and_the_bare_name_is_the_highest() -> None:
    old, new = _version(1), _version(2, "60d")
    found = Definitions.of([new, old])
    assert found.views == {"recent@1": old, "recent@2": new}
    assert (found.view("recent"), found.view("recent@1"), found.view("recent@2")) == (new, old, new)
    with pytest.raises(UnknownViewError, match=r"recent@3.*recent@1"):
        found.view("recent@3")


def test_one_version_is_declared_once() -> None:
    with pytest.raises(DuplicateNameError, match="recent@1"):
        Definitions.of([_version(1), _version(1, "60d")])
    with pytest.raises(DuplicateNameError, match="recent@1"):
        Definitions.of([_version(1), _version(1, "60d")], merge=True)
    assert list(Definitions.of([_version(1), _version(1)], merge=True).views) == ["recent@1"]


def test_a_model_reads_one_version_of_a_view() -> None:
    with pytest.raises(InvalidDefinitionError, match=r"versions \[1, 2\] of view 'recent'"):
        spec(features=[_version(1), _version(2)])
    assert spec(features=[_version(1)]).pinned_names == ("recent@1__count",)


def test_names_are_looked_up_with_a_version_where_it_isnt_the_highest() -> None:
    found = Definitions.of([_version(1), _version(2)])
    assert found.lookup_names(["recent@1__count", "recent@2__count"]) == ("recent@1__count", "recent__count")
    assert found.lookup_names(["recent@3__count"]) == ("recent@3__count",)


def test_a_pinned_view_is_the_same_view_under_columns_that_carry_its_version() -> None:
    view = _version(2)
    assert view.pinned["count"].name == "recent@2__count"
    assert view["count"].name == "recent__count"
    assert (view.pinned.ref, view.pinned.content_hash) == (view.ref, view.content_hash)
    assert view.pinned is view.pinned.pinned is view.pinned


def test_gate_that_asks_for_nothing_new_is_described_as_ever() -> None:
    assert "max_parity_mismatch" not in Gate().describe()
    assert Gate(max_parity_mismatch=0.01).describe()["max_parity_mismatch"] == 0.01
