"""A use case with all that a vector can be made of: payments, profiles of holders, an amount that requests bring."""

from __future__ import annotations

import pyarrow as pa

from heliostat.features.aggregations import Count, FloatArray, Last, Latest, Mean
from heliostat.features.definitions import Entity, EventSource, FeatureView, ProfileSource
from heliostat.models.definitions import Gate, Label, ModelSpec
from heliostat.schema import TIMESTAMP

card = Entity("card", keys={"card": "int64"})
payments = EventSource(
    "payments",
    schema=pa.schema(
        {"id": pa.int64(), "card": pa.int64(), "at": TIMESTAMP, "amount": pa.float64(), "country": pa.string()}
    ),
    entity=card,
    event_time="at",
    event_id="id",
)
holders = ProfileSource(
    "holders",
    schema=pa.schema({"card": pa.int64(), "since": TIMESTAMP, "home": pa.string()}),
    entity=card,
    updated_at="since",
)
spending = FeatureView(
    "spending",
    version=1,
    source=payments,
    features={
        "n_30d": Count(window="30d"),
        "mean_amount_30d": Mean("amount", window="30d"),
        "country": Last("country", window="30d"),
    },
    request={"amount": "float64"},
)


@spending.derived
def amount_ratio(amount: FloatArray, mean_amount_30d: FloatArray) -> FloatArray:
    return amount / mean_amount_30d


account = FeatureView("account", version=1, source=holders, features={"home": Latest("home")})
fraud = ModelSpec(
    "fraud",
    entity=card,
    features=[spending, account],
    label=Label.any_within("again", payments, "5d"),
    params={"num_leaves": 7, "min_data_per_group": 5},
    gate=Gate(max_calibration_error=None),
)
