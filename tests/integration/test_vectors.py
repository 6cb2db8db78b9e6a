"""One vector of everything: events and profiles, two entities, categories, inputs of the request; one round trip."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from heliostat.clock import US_PER_DAY, ManualClock, parse_instant_us
from heliostat.features.aggregations import Count, Last, Latest, Mean, Sum
from heliostat.features.categories import CategoryDictionary
from heliostat.features.definitions import Entity, EventSource, FeatureRef, FeatureView, FloatArray, ProfileSource
from heliostat.features.offline import compute_features
from heliostat.ingestion.checking import EventCheck
from heliostat.ingestion.intake import Intake
from heliostat.online.retrieval import FeatureReader
from heliostat.schema import TIMESTAMP, text_code
from heliostat.settings import Settings
from heliostat.storage.catalog import Catalog
from heliostat.storage.online_store import AsyncOnlineStore, OnlineStore

NOW_US = parse_instant_us("2024-06-01T12:00:00")

card = Entity("card", keys={"card": "int64"})
merchant = Entity("merchant", keys={"merchant": "string"})
payments = EventSource(
    "payments",
    schema=pa.schema(
        {
            "id": pa.string(),
            "card": pa.int64(),
            "merchant": pa.string(),
            "at": TIMESTAMP,
            "amount": pa.float64(),
            "country": pa.string(),
        }
    ),
    entity=(card, merchant),
    event_time="at",
    event_id="id",
)
holders = ProfileSource(
    "holders",
    schema=pa.schema({"card": pa.int64(), "since": TIMESTAMP, "home": pa.string(), "income": pa.float64()}),
    entity=card,
    updated_at="since",
)
spending = FeatureView(
    "spending",
    version=1,
    source=payments,
    entity=card,
    features={
        "n_7d": Count(window="7d"),
        "mean_amount_30d": Mean("amount", window="30d"),
        "last_country": Last("country", window="30d"),
    },
    request={"amount": "float64"},
)


@spending.derived
def amount_ratio(amount: FloatArray, mean_amount_30d: FloatArray) -> FloatArray:
    return amount / mean_amount_30d


account = FeatureView(
    "account", version=1, source=holders, features={"home": Latest("home"), "income": Latest("income")}
)
shops = FeatureView(
    "shops",
    version=1,
    source=payments,
    entity=merchant,
    features={"n": Count(), "turnover_1d": Sum("amount", window="1d")},
)
VIEWS = [spending, account, shops]
CARDS, MERCHANTS = ["1", "2", "3", "404"], ["a", "b", "c", "a"]
AMOUNTS = np.array([40.0, 3.5, np.nan, 12.0])


def made(n: int = 120) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Payments and profile rows, in an order that isn't that of time."""
    rng = np.random.default_rng(11)
    events = [
        {
            "id": f"p{each}",
            "card": int(rng.integers(1, 4)),
            "merchant": "abc"[rng.integers(3)],
            "at": NOW_US - int(rng.integers(1, 25 * 24)) * US_PER_DAY // 24,
            "amount": float(rng.gamma(2, 15)),
            "country": [None, "NL", "DE", "FR"][rng.integers(4)],
        }
        for each in range(n)
    ]
    rows = [
        {
            "card": key,
            "since": NOW_US - days * US_PER_DAY,
            "home": [None, "NL", "DE"][rng.integers(3)],
            "income": float(days),
        }
        for key in (1, 2)
        for days in rng.permutation(20).tolist()[:6]
    ]
    return events, rows


@pytest.fixture
def store(settings: Settings) -> Iterator[OnlineStore]:
    with OnlineStore.open(settings) as opened:
        yield opened


@pytest.fixture
def intake(store: OnlineStore, settings: Settings) -> Intake:
    clock = ManualClock(NOW_US)
    words = CategoryDictionary(lambda: Catalog.open(settings.catalog_url), VIEWS, clock)
    sources = [payments, holders]
    n_buckets = settings.storage.buckets
    return Intake(
        store, sources, VIEWS, clock=clock, settings=settings.ingestion, n_buckets=n_buckets, categories=words
    )


def reader(settings: Settings, *features: FeatureRef) -> FeatureReader:
    return FeatureReader.open(features, settings)


def accepted(source: EventSource, rows: list[dict[str, Any]]) -> pa.Table:
    return EventCheck(source, future_tolerance_us=0).check(rows, now_us=NOW_US).accepted


def test_the_vector_of_everything_is_what_the_kernel_computes(
    store: OnlineStore, intake: Intake, settings: Settings
) -> None:
    events, rows = made()
    # In no order of time: what is too old for the shortest ring is late, and missed by no window.
    assert {each.status for each in intake.submit("payments", events)} <= {"accepted", "late"}
    assert {each.status for each in intake.submit("holders", rows)} == {"accepted"}
    assert {each.status for each in intake.submit("holders", rows)} == {"duplicate"}
    whole = reader(settings, *spending, *account, *shops)
    batch, _ = whole.read(store, {"card": CARDS, "merchant": MERCHANTS}, as_of_us=NOW_US, inputs={"amount": AMOUNTS})
    instants = np.full(len(CARDS), NOW_US)
    log, profiles = accepted(payments, events), accepted(holders, rows)
    offline = {
        **compute_features([spending], log, card.encoded(CARDS), instants, request={"amount": AMOUNTS}),
        **compute_features([account], profiles, card.encoded(CARDS), instants),
        **compute_features([shops], log, merchant.encoded(MERCHANTS), instants),
    }
    expected = np.column_stack([offline[name] for name in batch.names])
    np.testing.assert_allclose(batch.matrix, expected, rtol=1e-12)
    assert np.isfinite(expected[:2]).sum() >= 12, "most of it has a value"
    assert batch.absent[3].tolist() == [True, True, False]
    places = [batch.names.index(name) for name in ("spending__last_country", "account__home")]
    assert set(batch.matrix[:3, places[0]]) <= {text_code(text) for text in ("NL", "DE", "FR")}
    words = CategoryDictionary(lambda: Catalog.open(settings.catalog_url), VIEWS, ManualClock(NOW_US))
    assert set(words.texts(spending, "last_country", batch.matrix[:3, places[0]])) <= {"NL", "DE", "FR"}
    newest = max((row for row in rows if row["card"] == 1), key=lambda row: row["since"])
    assert words.texts(account, "home", batch.matrix[:1, places[1]]) == [newest["home"]]


def calls(store: OnlineStore) -> dict[str, int]:
    """How often each command was run, but the one that asks."""
    told = store.client.info("commandstats")
    return {name.removeprefix("cmdstat_"): each["calls"] for name, each in told.items() if name != "cmdstat_info"}


@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_a_vector_is_one_mget_however_many_views_sources_and_entities(
    store: OnlineStore, intake: Intake, settings: Settings, n_views: int
) -> None:
    events, rows = made()
    intake.submit("payments", events)
    intake.submit("holders", rows)
    views = VIEWS[:n_views]
    some = reader(settings, *(ref for view in views for ref in view))
    texts = {"card": CARDS, "merchant": MERCHANTS}
    some.read(store, texts, as_of_us=NOW_US, inputs={"amount": AMOUNTS})  # the connection is there after that
    before = calls(store)
    batch, (route,) = some.read(
        store, texts, as_of_us=NOW_US, inputs={"amount": AMOUNTS}, also=[store.keys.route("fraud")]
    )
    after = calls(store)
    assert {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name)} == {
        "mget": 1
    }
    assert batch.matrix.shape == (4, sum(len(view.feature_names) for view in views))
    assert route is None


def test_the_same_holds_for_asyncio(intake: Intake, store: OnlineStore, settings: Settings) -> None:
    events, rows = made()
    intake.submit("payments", events)
    intake.submit("holders", rows)
    whole, texts = reader(settings, *spending, *account, *shops), {"card": CARDS, "merchant": MERCHANTS}
    blocking, _ = whole.read(store, texts, as_of_us=NOW_US, inputs={"amount": AMOUNTS})

    async def asked() -> tuple[dict[str, int], Any, dict[str, int]]:
        async with AsyncOnlineStore.open(settings) as other:
            await whole.aread(other, texts, as_of_us=NOW_US, inputs={"amount": AMOUNTS})
            before = calls(store)
            batch, _ = await whole.aread(other, texts, as_of_us=NOW_US, inputs={"amount": AMOUNTS})
            return before, batch, calls(store)

    before, batch, after = asyncio.run(asked())
    np.testing.assert_array_equal(batch.matrix, blocking.matrix)
    assert after["mget"] - before["mget"] == 1
    assert sum(after.values()) - sum(before.values()) == 1
