from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import HeliostatError, InvalidFieldError, InvalidValueError
from heliostat.features.definitions import Entity
from heliostat.models.definitions import Definitions, Label, ModelSpec
from heliostat.serving.answers import PredictAnswer, Predictions
from heliostat.serving.requests import PredictRequest, entity_texts, parse_actuals, parse_events, parse_predict
from tests.unit.serving.collaborators import ACTIVITIES, CHURN, DEFINITIONS, NAMES, USAGE

DEVICE = Entity("device", keys={"account": "string", "slot": "int64"})


def read(**body: object) -> PredictRequest:
    return parse_predict(orjson.dumps(body), DEFINITIONS, overridable=lambda _: frozenset(NAMES), max_entities=5)


def test_the_model_may_be_left_out_where_there_is_one() -> None:
    assert read(entity_ids=[1]) == PredictRequest("churn", ("1",), (1,))
    assert read(entity_ids=[1], model=None).model == "churn"


def test_a_model_in_the_path_is_the_one_that_is_asked_and_the_body_may_only_repeat_it() -> None:
    def of(**body: object) -> PredictRequest:
        return parse_predict(
            orjson.dumps(body), DEFINITIONS, overridable=lambda _: frozenset(NAMES), max_entities=5, model="churn"
        )

    assert of(entity_ids=[1]) == of(entity_ids=[1], model="churn") == PredictRequest("churn", ("1",), (1,))
    with pytest.raises(InvalidFieldError, match="'other'; expected 'churn', as in the path"):
        of(entity_ids=[1], model="other")


@pytest.mark.parametrize(("given", "explain"), [({}, False), ({"explain": None}, False), ({"explain": True}, True)])
def test_explanations_are_asked_for(given: dict[str, object], explain: bool) -> None:
    assert read(entity_ids=[1], **given).explain is explain


@pytest.mark.parametrize("wrong", [0, 1, "yes", [], {}])
def test_only_true_and_false_say_whether_to_explain(wrong: object) -> None:
    with pytest.raises(InvalidFieldError, match="expected true or false"):
        read(entity_ids=[1], explain=wrong)


def test_entity_ids_are_kept_as_written_beside_their_canonical_text() -> None:
    asked = read(entity_ids=[7, "8", {"user_id": 9}])
    assert asked.entities == ("7", "8", "9")
    assert asked.entity_ids == (7, "8", {"user_id": 9})


def test_keys_of_several_columns_are_objects_or_their_text() -> None:
    texts = entity_texts(DEVICE, [{"account": "a|b", "slot": 3}, "a%7Cb|3"])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("wrong", [True, 1.0, None, [], {}, "x", "", 2**63, {"other": 1}])
def test_an_id_of_the_wrong_type_is_refused(wrong: object) -> None:
    with pytest.raises(InvalidValueError):
        entity_texts(CHURN.entity, [wrong])


def test_overrides_by_place_and_by_entity_mean_the_same() -> None:
    by_place = read(entity_ids=[1, 2], features=[None, {NAMES[0]: 3, NAMES[1]: None}])
    by_key = read(entity_ids=[1, 2], features={"2": {NAMES[0]: 3, NAMES[1]: None}})
    assert list(by_place.overrides) == list(by_key.overrides) == [1]
    for asked in (by_place, by_key):
        assert asked.overrides[1][NAMES[0]] == 3.0
        assert math.isnan(asked.overrides[1][NAMES[1]])


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from([*NAMES, "unheard_of"]),
            st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([3, True, None, "text", [1]]),
            max_size=3,
        )
        | st.none(),
        min_size=1,
        max_size=4,
    )
    | st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES[:2], st.floats(-1e308, 1e308))), min_size=1, max_size=4)
)
def test_what_rows_give_does_not_depend_on_the_rows_beside_them(rows: list[dict[str, object] | None]) -> None:
    ids = list(range(len(rows)))
    try:
        alone = [read(entity_ids=[at], features={str(at): row or {}}).overrides.get(0) for at, row in enumerate(rows)]
    except HeliostatError as error:
        with pytest.raises(type(error)):
            read(entity_ids=ids, features=rows)
        return
    together = read(entity_ids=ids, features=rows).overrides
    assert [repr(together.get(at)) for at in ids] == [repr(each or None) for each in alone]


def test_overrides_by_entity_hold_wherever_the_entity_is_repeated() -> None:
    assert list(read(entity_ids=[1, 2, 1], features={"1": {NAMES[0]: 3}}).overrides) == [0, 2]


def test_too_many_entities_are_refused_with_the_setting_that_says_so() -> None:
    with pytest.raises(InvalidFieldError, match="max_entities_per_request"):
        read(entity_ids=list(range(6)))


def test_a_model_must_be_named_where_there_are_several() -> None:
    other = ModelSpec("other", entity=CHURN.entity, features=[USAGE], label=Label.any_within("any", ACTIVITIES, "1d"))
    definitions = Definitions.of([CHURN, other])
    with pytest.raises(HeliostatError, match="churn, other"):
        parse_predict(b'{"entity_ids": [1]}', definitions, overridable=lambda _: frozenset(NAMES), max_entities=5)


documents = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["model", "entity_ids", "features", "source", "events", "actuals", "value"]), inner
        )
    ),
    max_leaves=8,
)


def refusal(parse: Callable[[], object]) -> HeliostatError | None:
    try:
        parse()
    except HeliostatError as error:
        return error
    return None


@given(documents)
def test_whatever_json_arrives_it_is_read_or_refused_with_a_client_error(document: object) -> None:
    try:
        body = orjson.dumps(document)
    except TypeError:  # an integer beyond 64 bits
        body = str(document).encode()
    for parse in (
        lambda: parse_predict(body, DEFINITIONS, overridable=lambda _: frozenset(NAMES), max_entities=5),
        lambda: parse_events(body),
        lambda: parse_actuals(body, DEFINITIONS, max_actuals=5),
    ):
        error = refusal(parse)
        assert error is None or (400 <= error.http_status < 500 and str(error))


@given(st.binary(max_size=60))
def test_whatever_bytes_arrive_they_are_refused_with_a_client_error(body: bytes) -> None:
    error = refusal(lambda: parse_predict(body, DEFINITIONS, overridable=lambda _: frozenset(NAMES), max_entities=5))
    assert error is not None
    assert error.http_status in (400, 404, 422)


def test_events_may_be_one_or_many() -> None:
    assert parse_events(b'{"source": "a", "events": {"x": 1}}') == ("a", [{"x": 1}])
    assert parse_events(b'{"source": "a", "events": [{"x": 1}, 2]}') == ("a", [{"x": 1}, 2])


def test_actuals_name_a_prediction_or_an_entity_and_an_instant() -> None:
    by_id, by_entity = parse_actuals(
        b'{"actuals": [{"prediction_id": "p", "value": true}, {"entity_id": 3, "as_of": "1970-01-02", "value": 2}]}',
        DEFINITIONS,
        max_actuals=5,
    )
    assert (by_id.model, by_id.prediction_id, by_id.value) == ("churn", "p", 1.0)
    assert (by_entity.entity, by_entity.as_of_us, by_entity.value) == ("3", 86_400_000_000, 2.0)


def test_an_answer_shows_everything_that_a_client_needs() -> None:
    vectors = np.array([[math.nan]])
    predictions = Predictions([0.5], [3], ["prior"], vectors, [("a__b",)], ["control"], [("a@1",)])
    document = PredictAnswer("r", "churn", 3, 9, (7,), predictions).document(1.23456)
    assert document == {
        "model": "churn",
        "model_version": 3,
        "predictions": [0.5],
        "latency_ms": 1.235,
        "request_id": "r",
        "logged": True,
        "entities": [
            {
                "entity_id": 7,
                "prediction": 0.5,
                "variant": "control",
                "model_version": 3,
                "prediction_id": "r-0",
                "missing_features": ("a__b",),
                "absent_views": ("a@1",),
                "source": "fallback",
                "degraded": True,
                "fallback": "prior",
                "features_from": None,
                "fallback_age_s": None,
            }
        ],
        "degraded": True,
        "fallback": "prior",
    }
