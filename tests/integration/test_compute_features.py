"""Snapshots by day: the job, on a real Ray, from the event log into the offline store."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from configs.churn.definitions import purchase_history, purchases
from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import InvalidValueError, UnknownViewError
from heliostat.schema import TIMESTAMP
from heliostat.settings import Settings
from heliostat.workspace import Workspace
from jobs.compute_features import chosen_days_us, main
from tests.oracles import Oracle

NOW_US = parse_instant_us("1998-07-01T06:00:00Z")


def day(text: str) -> int:
    return parse_instant_us(text)


def test_days_are_single_ones_a_range_or_today() -> None:
    assert chosen_days_us([], None, None, now_us=NOW_US) == [day("1998-07-01")]
    assert chosen_days_us(["1998-06-02", "1998-06-01T17:00"], None, None, now_us=NOW_US) == [
        day("1998-06-01"),
        day("1998-06-02"),
    ]
    assert chosen_days_us(["1998-06-30"], "1998-06-29", None, now_us=NOW_US) == [
        day("1998-06-29"),
        day("1998-06-30"),
        day("1998-07-01"),
    ]
    assert len(chosen_days_us([], "1998-06-01", "1998-06-30", now_us=NOW_US)) == 30


@pytest.mark.parametrize(
    ("days", "first", "last", "problem"),
    [
        (["1998-07-02"], None, None, "has begun"),
        ([], "1998-06-02", "1998-06-01", "not before --from"),
        ([], None, "1998-06-01", "a --from with it"),
        (["yesterday"], None, None, "ISO 8601"),
    ],
)
def test_days_that_cannot_be_are_refused(days: list[str], first: str | None, last: str | None, problem: str) -> None:
    with pytest.raises(InvalidValueError, match=problem):
        chosen_days_us(days, first, last, now_us=NOW_US)


@pytest.fixture
def bought(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    """Purchases in the log of the settings, which the job will find in its environment."""
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    rng, n = np.random.default_rng(8), 400
    events = pa.table(
        {
            "event_id": np.arange(n),
            "customer_id": rng.integers(1, 50, n),
            "purchased_at": pa.array(NOW_US - rng.integers(0, 60, n) * US_PER_DAY).cast(TIMESTAMP),
            "quantity": rng.integers(1, 9, n),
            "amount": np.round(rng.gamma(2.0, 15.0, n), 2),
        },
        schema=purchases.schema,
    )
    with Workspace.open(settings) as workspace:
        workspace.event_log.append(purchases, events, ingested_us=NOW_US)
    return events


@pytest.mark.usefixtures("ray_local")
def test_a_days_snapshot_holds_every_customer_known_by_then(
    settings: Settings, bought: pa.Table, capsys: pytest.CaptureFixture[str]
) -> None:
    days = ["1998-06-01", "1998-06-02"]
    main(view=["purchase_history"], first=days[0], last=days[1], as_json=True, home=settings.home)
    main(view=["purchase_history"], day=[days[1]], home=settings.home)
    printed = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["as_of"] for line in printed[:2]] == [f"{each}T00:00:00Z" for each in days]
    assert printed[2].endswith("entities as of 1998-06-02T00:00:00Z")

    store = Workspace.open(settings).offline_store
    assert store.days(purchase_history.ref) == days
    oracle = Oracle(purchase_history, bought)
    times = bought["purchased_at"].cast(pa.int64()).to_numpy()
    for each in days:
        rows = store.read(purchase_history.ref, start_us=day(each), end_us=day(each) + 1)
        known = set(bought["customer_id"].to_numpy()[times < day(each)].tolist())
        assert sorted(rows["customer_id"].to_pylist()) == sorted(known), "computing a day again replaces it"
        for row in rows.to_pylist():
            for name, answer in oracle.answer((row["customer_id"],), day(each)).items():
                value = row[f"purchase_history__{name}"]
                assert answer.accepts(float("nan") if value is None else value)


@pytest.mark.usefixtures("ray_local", "bought")
def test_an_unknown_view_is_named(settings: Settings) -> None:
    with pytest.raises(UnknownViewError, match=r"'nope'.*purchase_history@1"):
        main(view=["nope"], home=settings.home)
