"""The reference use case: which customers of CDNOW won't buy again within 90 days.

CDNOW sold music on the web; the log holds every purchase of the 23,570 customers who first
bought in the first quarter of 1997, up to the end of June 1998 (Fader and Hardie 2001).
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from heliostat import (
    Count,
    DistinctDays,
    Entity,
    EventSource,
    FeatureView,
    First,
    FloatArray,
    Gate,
    Label,
    Last,
    Max,
    Mean,
    Min,
    ModelSpec,
    Sum,
    TimeSinceLast,
)

customer = Entity("customer", keys={"customer_id": "int64"}, description="A person who bought at CDNOW")

purchases = EventSource(
    "purchases",
    schema=pa.schema(
        {
            "event_id": pa.int64(),
            "customer_id": pa.int64(),
            "purchased_at": pa.timestamp("us", tz="UTC"),
            "quantity": pa.int64(),
            "amount": pa.float64(),
        }
    ),
    entity=customer,
    event_time="purchased_at",
    event_id="event_id",
    description="One row a purchase; amount in US dollars",
)

# What one purchase adds to the activity score: a big basket says more than a single disc.
ACTIVITY_WEIGHT = pc.if_else(pc.field("quantity") >= 3, pc.scalar(5.0), pc.scalar(1.0))

recent_purchases = FeatureView(
    "recent_purchases",
    version=1,
    source=purchases,
    features={
        "count_30d": Count(window="30d"),
        "count_90d": Count(window="90d"),
        "amount_90d": Sum("amount", window="90d"),
        "days_90d": DistinctDays(window="90d"),
        "quantity_90d": Sum("quantity", window="90d"),
        "weight_90d": Sum(ACTIVITY_WEIGHT, window="90d"),
    },
    tags={"team": "retention"},
    owner="retention@example.com",
    description="What a customer did in the last three months",
)


@recent_purchases.derived
def activity_score(weight_90d: FloatArray) -> FloatArray:
    """The logarithm of the summed weights: 0 for a customer who did nothing."""
    return np.log1p(weight_90d)


purchase_history = FeatureView(
    "purchase_history",
    version=1,
    source=purchases,
    features={
        "recency_days": TimeSinceLast(unit="day"),
        "frequency": Count(),
        "monetary": Mean("amount"),
        "spent": Sum("amount"),
        "smallest": Min("amount"),
        "largest": Max("amount"),
        "first_amount": First("amount"),
        "last_amount": Last("amount"),
        "large_orders": Count(where=pc.field("amount") >= 50),
    },
    tags={"team": "retention"},
    owner="retention@example.com",
    description="Recency, frequency and monetary value over a customer's whole life",
)

churned = Label.none_within("churned", purchases, "90d", description="No purchase in the next 90 days")

churn = ModelSpec(
    "churn",
    entity=customer,
    features=[recent_purchases, purchase_history],
    label=churned,
    objective="binary",
    metric="auc",
    params={"num_leaves": 15, "min_data_in_leaf": 100, "seed": 7},
    search_space={
        "learning_rate": (0.03, 0.3),
        "num_leaves": (7, 15, 31),
        "min_data_in_leaf": (50, 100, 200),
    },
    gate=Gate(min_metric=0.7, max_regression=0.02, max_calibration_error=0.1),
    description="Who won't buy again within 90 days",
)
