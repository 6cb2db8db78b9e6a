"""The feature store for programs with Ray Datasets in and out, on a real Ray."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import ray.data

from heliostat import Entity, PrecomputedView, feature_store
from heliostat.clock import parse_instant_us
from heliostat.errors import InvalidValueError
from heliostat.feature_store import FeatureStore
from heliostat.schema import TIMESTAMP
from heliostat.settings import Settings

pytestmark = pytest.mark.usefixtures("ray_local")

CUSTOMER = Entity("customer", keys={"customer_id": "int64"})
SCORES = PrecomputedView("scores", version=1, entity=CUSTOMER, features=["risk"])
WHEN = "1998-06-01"


@pytest.fixture
def store(settings: Settings) -> Iterator[FeatureStore]:
    with FeatureStore.open(settings, definitions=[SCORES]) as opened:
        opened.register([SCORES])
        yield opened


def _rows(n: int = 300) -> pa.Table:
    ids = np.arange(n)
    return pa.table({"customer_id": ids, "risk": ids / 7})


def _blocks(table: pa.Table) -> ray.data.Dataset:
    third = table.num_rows // 3
    return ray.data.from_arrow([table.slice(0, third), table.slice(third, third), table.slice(2 * third)])


def _table(dataset: ray.data.Dataset) -> pa.Table:
    return pa.concat_tables(dataset.iter_batches(batch_format="pyarrow", batch_size=None)).sort_by("customer_id")


@pytest.mark.slow
@pytest.mark.parametrize("write", ["write_online", "write_offline"])
def test_a_dataset_is_written_by_tasks_and_read_back_as_a_dataset(store: FeatureStore, write: str) -> None:
    done = getattr(store, write)(_blocks(_rows()), "scores", WHEN)
    assert (done.new, done.known) == (300, 0)
    again = getattr(store, write)(_blocks(_rows()), "scores", WHEN)
    assert (again.new, again.known) == (0, 300)
    store.flush()
    if write == "write_offline":
        store.materialize(["scores"])
    asked = _blocks(pa.table({"customer_id": np.arange(301), "kept": ["yes"] * 301}))
    expected = [*(_rows().column("risk").to_pylist()), None]

    online = store.get_online(asked, "scores")
    assert isinstance(online, ray.data.Dataset)
    found = _table(online)
    assert found.column_names == ["customer_id", "kept", "scores__risk", "scores__is_absent"]
    assert [None if value != value else value for value in found.column("scores__risk").to_pylist()] == expected
    assert found.column("scores__is_absent").to_pylist() == [False] * 300 + [True]

    kept = store.get_offline(asked, "scores", WHEN, "1998-06-02")
    assert isinstance(kept, ray.data.Dataset)
    assert _table(kept).column("scores__risk").to_pylist() == expected[:-1]
    assert store.get_offline(asked, "scores", "1998-06-02", "1998-06-03").count() == 0


@pytest.mark.slow
def test_a_spine_that_is_a_dataset_keeps_its_rows(store: FeatureStore) -> None:
    store.write_offline(_rows(), "scores", WHEN)
    instants = [parse_instant_us(WHEN) + offset for offset in (0, 1)] * 30
    spine = pa.table({"customer_id": np.arange(60) // 2, "as_of": pa.array(instants).cast(TIMESTAMP)})
    found = store.get_historical(_blocks(spine), ["scores"])
    assert isinstance(found, ray.data.Dataset)
    table = _table(found).sort_by("spine_row")
    assert table.column("customer_id").to_pylist() == spine.column("customer_id").to_pylist()
    values = table.column("scores__risk").to_numpy()
    assert np.isnan(values[::2]).all(), "the row of that very instant isn't known yet"
    np.testing.assert_array_equal(values[1::2], np.arange(30) / 7)
    as_frame = store.get_historical(spine.to_pandas(), ["scores"])
    np.testing.assert_array_equal(as_frame["scores__risk"], values)


def test_every_part_of_a_large_block_is_counted(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_store, "ROWS_AT_ONCE", 100)
    done = store.write_online(ray.data.from_arrow(_rows(250)), "scores", WHEN)
    assert (done.new, done.known) == (250, 0)


def test_a_dataset_with_a_wrong_block_says_what_is_wrong_and_writes_no_offline_row(store: FeatureStore) -> None:
    infinite = pa.table({"customer_id": [1, 2], "risk": [0.5, float("inf")]})
    wrong = ray.data.from_arrow([_rows(10), infinite])
    for write in (store.write_offline, store.write_online):
        with pytest.raises(InvalidValueError, match="±Inf in 1 rows"):
            write(wrong, "scores", WHEN)
    assert store.get_offline(None, "scores", "1998-01-01", "1998-07-01").num_rows == 0
