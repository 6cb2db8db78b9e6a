"""Rings, offline kernel and oracle on the reference use case: customers of CDNOW at five instants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from configs.churn.cdnow import write_parquet
from configs.churn.definitions import customer, purchase_history, purchases, recent_purchases
from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.features.offline import compute_features
from heliostat.online.bucket_rings import BucketJob, BucketTask
from heliostat.online.live import LiveRings, remember_ms
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.schema import conform, times_us
from heliostat.settings import Settings
from heliostat.storage.event_log import EventLog
from heliostat.storage.online_store import OnlineStore
from tests.oracles import Oracle, derived

VIEWS = (recent_purchases, purchase_history)
INSTANTS_US = [
    parse_instant_us(text) for text in ("1997-03-01", "1997-06-15T10:30:00", "1997-10-01", "1998-01-01", "1998-07-01")
]
N_CUSTOMERS = 1_000
TOGETHER = 25


@pytest.fixture(scope="module")
def cdnow(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """All purchases of every 20th customer or so, 1,000 of them."""
    file = Path(tmp_path_factory.mktemp("cdnow")) / "purchases.parquet"
    write_parquet(file)
    table = conform(pq.read_table(file), purchases.schema, what="the CDNOW log")
    customers = np.unique(table["customer_id"].to_numpy())
    chosen = np.random.default_rng(1997).choice(customers, N_CUSTOMERS, replace=False)
    return table.filter(pc.is_in(table["customer_id"], pa.array(np.sort(chosen))))


@pytest.fixture
def store(settings: Settings) -> Iterator[OnlineStore]:
    with OnlineStore.open(settings) as opened:
        yield opened


def between(events: pa.Table, begin_us: int, end_us: int) -> pa.Table:
    times = times_us(events["purchased_at"])
    return events.filter(pa.array((times >= begin_us) & (times < end_us)))


def check(store: OnlineStore, settings: Settings, events: pa.Table, as_of_us: int) -> None:
    """Every feature of every customer, three ways."""
    reader = FeatureReader.open([feature for view in VIEWS for feature in view], settings)
    ids = pc.unique(events["customer_id"]).to_pylist()
    batch, _ = reader.read(store, [str(each) for each in ids], as_of_us=as_of_us)
    offline = compute_features(VIEWS, events, pa.array(ids), np.full(len(ids), as_of_us))
    places = {name: column for column, name in enumerate(batch.names)}
    for first in range(0, len(ids), TOGETHER):
        some = ids[first : first + TOGETHER]
        own = events.filter(pc.is_in(events["customer_id"], pa.array(some)))
        for view in VIEWS:
            oracle = Oracle(view, own)
            for row, key in enumerate(some, first):
                for name, answer in oracle.answer((key,), as_of_us).items():
                    full = f"{view.name}__{name}"
                    assert answer.accepts(batch.matrix[row, places[full]]), (key, full, as_of_us)
                    assert answer.accepts(offline[full][row]), (key, full, as_of_us)
                found = {name: batch.matrix[row, places[f"{view.name}__{name}"]] for name in view.base_features}
                for name, value in derived(view, found).items():
                    np.testing.assert_allclose(batch.matrix[row, places[f"{view.name}__{name}"]], value, rtol=1e-14)


def test_rings_kernel_and_oracle_agree_on_a_thousand_customers_at_five_instants(
    cdnow: pa.Table, settings: Settings, store: OnlineStore
) -> None:
    """At each instant: live events since the one before, then the same from history."""
    limits = RingLimits.of(settings.ingestion)
    log = EventLog(settings.data_root, n_buckets=settings.storage.buckets)
    live = LiveRings.open(purchases, VIEWS, settings)
    since_us = INSTANTS_US[0]
    for as_of_us in INSTANTS_US:
        arrived = between(cdnow, since_us, as_of_us)
        if arrived.num_rows:
            shuffled = arrived.take(pa.array(np.random.default_rng(as_of_us % 2**32).permutation(arrived.num_rows)))
            updates = live.updates(shuffled, [(b"e", b"")] * shuffled.num_rows)
            outcomes = store.apply_events(updates, remember_ms=remember_ms(limits))
            assert "duplicate" not in outcomes
            check(store, settings, cdnow, as_of_us)
        log.append(purchases, between(cdnow, 0 if since_us == as_of_us else since_us, as_of_us), ingested_us=as_of_us)
        version = log.version(purchases, customer)
        task = BucketTask(VIEWS, log, version, store.config, as_of_us, limits)
        for bucket in range(settings.storage.buckets):
            task.run(BucketJob(bucket, None, as_of_us), store)
        check(store, settings, cdnow, as_of_us)
        since_us = as_of_us
    assert INSTANTS_US[-1] - times_us(cdnow["purchased_at"]).max() <= 2 * US_PER_DAY
