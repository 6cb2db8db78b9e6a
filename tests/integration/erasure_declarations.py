"""A use case whose keys are texts: purchases of customers in shops, from devices; a model about customers."""

from __future__ import annotations

import pyarrow as pa

from heliostat.features.aggregations import Count, Last, Max, Sum
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.models.definitions import Label, ModelSpec
from heliostat.schema import TIMESTAMP

USER = Entity("user", keys={"user": "string"})
SHOP = Entity("shop", keys={"shop": "string"})
DEVICE = Entity("device", keys={"user": "string", "device": "string"})

COLUMNS = {
    "event_id": pa.string(),
    "user": pa.string(),
    "shop": pa.string(),
    "device": pa.string(),
    "at": TIMESTAMP,
    "amount": pa.float64(),
}
SALES = EventSource(
    "sales", schema=pa.schema(COLUMNS), entity=[USER, SHOP, DEVICE], event_time="at", event_id="event_id"
)

user_sales = FeatureView(
    "user_sales",
    version=1,
    source=SALES,
    entity=USER,
    features={"n_30d": Count(window="30d"), "largest": Max("amount")},
)
shop_sales = FeatureView(
    "shop_sales",
    version=1,
    source=SALES,
    entity=SHOP,
    features={"n_30d": Count(window="30d"), "sold": Sum("amount"), "last": Last("amount")},
)
device_sales = FeatureView(
    "device_sales", version=1, source=SALES, entity=DEVICE, features={"n_30d": Count(window="30d")}
)

churn = ModelSpec(
    "churn", entity=USER, features=[user_sales], label=Label.none_within("churned", SALES, "30d"), metric="auc"
)
