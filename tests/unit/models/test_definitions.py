from __future__ import annotations

from collections.abc import Callable

import pyarrow.compute as pc
import pytest

from configs.churn import definitions as churn
from heliostat import Entity, EventSource, Label, ModelSpec, Population
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
from heliostat.models.definitions import Definitions


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
