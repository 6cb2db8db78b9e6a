"""What a request brings for derived features: read, looked up with, logged; the same numbers as in training."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from heliostat.clock import US_PER_DAY, ManualClock
from heliostat.errors import InvalidFieldError, MissingInputError, UnknownOverrideError
from heliostat.experiments.assignment import RoutingDocument
from heliostat.features.aggregations import Count, Last, Mean
from heliostat.features.definitions import Entity, EventSource, FeatureView, FloatArray
from heliostat.features.offline import compute_features
from heliostat.models.definitions import Definitions, Label, ModelSpec
from heliostat.schema import TIMESTAMP, text_code
from heliostat.serving.lookup import FeatureLookup, FeatureQuery, FeatureReaders
from heliostat.serving.prediction_log import PredictionLog
from heliostat.serving.predictor import Predictor, Stages
from heliostat.serving.requests import PredictRequest, parse_predict
from heliostat.serving.routing import ABRouter
from heliostat.serving.scoring import ScoreQuery
from heliostat.serving.version_book import VersionBook, VersionFacts
from tests.rings import rings_of
from tests.unit.serving.collaborators import KEYS, LIMITS, N_BUCKETS, NOW_US, OnlineMemory, Stream

CARD = Entity("card", keys={"card": "int64"})
PAYMENTS = EventSource(
    "payments",
    schema=pa.schema(
        {"id": pa.int64(), "card": pa.int64(), "at": TIMESTAMP, "amount": pa.float64(), "country": pa.string()}
    ),
    entity=CARD,
    event_time="at",
    event_id="id",
)
SPENDING = FeatureView(
    "spending",
    version=1,
    source=PAYMENTS,
    features={"n": Count(window="30d"), "mean": Mean("amount", window="30d"), "country": Last("country")},
    request={"amount": "float64", "abroad": "bool"},
)


@SPENDING.derived
def ratio(amount: FloatArray, mean: FloatArray) -> FloatArray:
    return amount / mean


@SPENDING.derived
def alarming(ratio: FloatArray, abroad: FloatArray) -> FloatArray:
    return ratio * (1 + abroad)


LABEL = Label.any_within("again", PAYMENTS, "7d")
FRAUD = ModelSpec("fraud", CARD, [SPENDING], LABEL)
PLAIN = ModelSpec("plain", CARD, [SPENDING["n"]], LABEL)
DEFINITIONS = Definitions.of([FRAUD, PLAIN])
EVENTS = pa.Table.from_pylist(
    [
        {"id": each, "card": each % 2, "at": NOW_US - each * US_PER_DAY, "amount": 10.0 * each, "country": "NL"}
        for each in range(1, 6)
    ],
    schema=PAYMENTS.schema,
)


def read(**body: object) -> PredictRequest:
    names = [name for ref in SPENDING for name in (ref.name, ref.feature)]
    return parse_predict(orjson.dumps(body), DEFINITIONS, overridable=lambda _: set(names), max_entities=5)


class Served:
    """A predictor over a memory, whose model answers with the last of its features, -1 for null."""

    def __init__(self) -> None:
        rings = rings_of([SPENDING], EVENTS, keys=KEYS, n_buckets=N_BUCKETS, as_of_us=NOW_US, limits=LIMITS)
        self.store, self.stream = OnlineMemory(rings), Stream()
        self.names: tuple[str, ...] = FRAUD.feature_names
        self.store.publish(RoutingDocument.single("fraud", 1, revision=1))
        clock = ManualClock(NOW_US)
        self.readers = FeatureReaders(DEFINITIONS, keys=KEYS, n_buckets=N_BUCKETS, limits=LIMITS)
        self.lookup = FeatureLookup(self.store, self.readers, clock)  # type: ignore[arg-type] # it only reads
        self.predictor = Predictor(
            Stages(self.lookup, ABRouter(lambda _: None), self._score, ABRouter(lambda _: None)),
            self.readers,
            VersionBook(lambda *_: VersionFacts(self.names, 0.5)),
            PredictionLog(self.stream.append),
            clock,
        )

    async def _score(self, query: ScoreQuery) -> NDArray[np.float64]:
        return np.nan_to_num(query.matrix[:, -1], nan=-1.0)

    def answers(self, *requests: PredictRequest) -> list[list[float]]:
        async def asked() -> list[list[float]]:
            found = await asyncio.gather(*(self.predictor.predict(request) for request in requests))
            return [[each.score for each in answer.entities] for answer in found]

        return asyncio.run(asked())


def expected(cards: Sequence[int], amounts: Sequence[float], abroad: Sequence[float]) -> FloatArray:
    """What training computes."""
    request = {"amount": np.array(amounts, dtype=float), "abroad": np.array(abroad, dtype=float)}
    found = compute_features([SPENDING], EVENTS, pa.array(cards), np.full(len(cards), NOW_US), request=request)
    return np.column_stack([found[name] for name in FRAUD.feature_names])


def test_a_prediction_sees_what_training_computes_from_the_same_inputs() -> None:
    served = Served()
    inputs = [{"amount": 60, "abroad": True}, {"amount": 5.5, "abroad": False}]
    (scores,) = served.answers(read(model="fraud", entity_ids=[0, 1], inputs=inputs))
    wanted = expected([0, 1], [60, 5.5], [1, 0])
    np.testing.assert_allclose(scores, wanted[:, -1], rtol=1e-14)
    np.testing.assert_allclose([entry["features"] for entry in served.stream.entries()], wanted, rtol=1e-14)
    assert [orjson.loads(str(entry["inputs"])) for entry in served.stream.entries()] == [
        {"amount": 60.0, "abroad": 1.0},
        {"amount": 5.5, "abroad": 0.0},
    ]


def test_requests_that_are_answered_together_keep_their_own_inputs() -> None:
    served = Served()
    bodies = [
        {"entity_ids": [0], "inputs": [{"amount": 1, "abroad": False}]},
        {"entity_ids": [1, 0], "inputs": {"0": {"amount": 2, "abroad": True}, "1": {"amount": 3, "abroad": False}}},
        {"entity_ids": [1], "inputs": [{"amount": None, "abroad": False}]},
    ]
    scores = served.answers(*(read(model="fraud", **body) for body in bodies))
    wanted = np.nan_to_num(expected([0, 1, 0, 1], [1, 3, 2, np.nan], [0, 0, 1, 0])[:, -1], nan=-1.0)
    np.testing.assert_allclose([each for answer in scores for each in answer], wanted, rtol=1e-14)
    assert len(served.store.reads) == 1
    assert orjson.loads(str(served.stream.entries()[3]["inputs"])) == {"amount": None, "abroad": 0.0}


def test_a_null_input_is_a_value_and_a_missing_one_an_error_that_names_it() -> None:
    asked = read(model="fraud", entity_ids=[0], inputs=[{"amount": None, "abroad": None}])
    assert np.isnan(list(asked.inputs[0].values())).all()
    with pytest.raises(MissingInputError, match=r"model 'fraud' needs 'abroad'.* for entity 7"):
        read(model="fraud", entity_ids=[0, 7], inputs={"0": {"amount": 1, "abroad": True}, "7": {"amount": 1}})
    with pytest.raises(MissingInputError, match="'amount', 'abroad'") as error:
        read(model="fraud", entity_ids=[0])
    assert error.value.http_status == 422


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([{"amount": "1", "abroad": True}], r"inputs\[0\]\.amount is a text.*a finite number or null"),
        ([{"amount": 1, "abroad": 1}], r"inputs\[0\]\.abroad is a number.*true, false or null"),
        ([{"amount": 1, "abroad": True, "colour": 1}], r"inputs\[0\]\.colour.*amount, abroad"),
        ([3], r"inputs\[0\] is a number"),
        ("x", "field 'inputs' is a text"),
        ([], "field 'inputs' has 0 items"),
        ({"9": {"amount": 1, "abroad": True}}, r"inputs\['9'\].*isn't among the entity ids"),
    ],
)
def test_wrong_inputs_are_told_where_and_why(inputs: Any, message: str) -> None:
    with pytest.raises(InvalidFieldError, match=message):
        read(model="fraud", entity_ids=[0], inputs=inputs)


def test_a_model_that_takes_nothing_is_given_nothing() -> None:
    assert read(model="plain", entity_ids=[0]).inputs == {}
    with pytest.raises(InvalidFieldError, match="no inputs"):
        read(model="plain", entity_ids=[0], inputs=[{"amount": 1}])


def test_an_older_version_that_takes_more_gets_null_for_what_nobody_was_asked_for() -> None:
    served = Served()
    block = asyncio.run(served.lookup(FeatureQuery("plain", FRAUD.feature_names, ("0",))))
    assert np.isnan(block.values[0, -2:]).all()
    assert block.values[0, 0] == 2.0


def test_without_the_store_derived_features_still_take_what_the_request_brings() -> None:
    served = Served()
    query = FeatureQuery(
        "fraud", FRAUD.feature_names, ("0",), {0: {"mean": 4.0}}, {0: {"amount": 8.0, "abroad": 1.0}}
    )
    block = served.readers.blank(query, as_of_us=NOW_US)
    assert block.values[0, -2:].tolist() == [2.0, 4.0]


def test_a_category_may_be_given_as_its_text() -> None:
    asked = read(model="fraud", entity_ids=[0], features=[{"country": "DE"}], inputs=[{"amount": 1, "abroad": True}])
    assert asked.overrides[0] == {"country": text_code("DE")}
    with pytest.raises(InvalidFieldError, match="a text"):
        read(model="fraud", entity_ids=[0], features=[{"n": "DE"}], inputs=[{"amount": 1, "abroad": True}])
    with pytest.raises(UnknownOverrideError):
        read(model="fraud", entity_ids=[0], features=[{"town": "x"}], inputs=[{"amount": 1, "abroad": True}])
