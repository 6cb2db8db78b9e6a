"""docs/window-contract.md, sentence by sentence, in both engines, and for anything that may happen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliostat import (
    Count,
    CountDistinct,
    EventSource,
    FeatureView,
    First,
    Last,
    Max,
    Mean,
    Min,
    Quantile,
    StdDev,
    Sum,
)
from heliostat.clock import US_PER_DAY, US_PER_HOUR, US_PER_MINUTE, parse_instant_us
from heliostat.features.offline import compute_features, unique_events
from heliostat.online.backfill import views_together
from heliostat.online.live import LiveRings, remember_ms
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits, ring_layout
from heliostat.schema import TIMESTAMP, hash64, tie48, times_us
from heliostat.storage.online_store import OnlineConfig, OnlineStore
from tests.history import History
from tests.oracles import Oracle
from tests.strategies import KEYS, ORDERS, ORIGIN_US, SHOP, SOURCES, UNKNOWN, USER, key_table, order_streams, views

quick = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
exhaustive = settings(quick, max_examples=2_000)

N_BUCKETS = 2
# The strategies' events arrive up to three days late; the sink needs an hour more.
LIMITS = RingLimits(3 * US_PER_DAY + US_PER_HOUR, 60_000_000)
PEOPLE = [*KEYS[USER.name], UNKNOWN[USER.name]]
SHOPS = [*KEYS[SHOP.name], UNKNOWN[SHOP.name]]
Key = tuple[Any, ...]

_projects = (f"contract{number}" for number in itertools.count())


class Online:
    """The rings of several views over one source, in a project of their own."""

    def __init__(self, url: str, declared: Sequence[FeatureView]) -> None:
        self.store = OnlineStore(OnlineConfig(url, project=next(_projects)))
        self.views, self.source = declared, declared[0].source
        layouts = [ring_layout(view, LIMITS) for view in declared]
        self.live = LiveRings(self.source, layouts, keys=self.store.keys, n_buckets=N_BUCKETS)
        features = [feature for view in declared for feature in view]
        self.reader = FeatureReader(features, keys=self.store.keys, n_buckets=N_BUCKETS, limits=LIMITS)

    def apply(self, events: pa.Table) -> None:
        updates = self.live.updates(events, [(b"e", b"payload")] * events.num_rows)
        list(self.store.apply_events(updates, remember_ms=remember_ms(LIMITS)))

    def materialize(self, log: pa.Table, as_of_us: int) -> None:
        for views_of_one in views_together(self.views):
            History(views_of_one, log, as_of_us, store=self.store, n_buckets=N_BUCKETS, limits=LIMITS).write()

    def read(self, keys: dict[str, list[Key]], as_of_us: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Features by name, and which views are absent, of all views in one round trip."""
        texts = {
            entity.name: [entity.text(dict(zip(entity.key_columns, key, strict=True))) for key in keys[entity.name]]
            for entity in self.source.entities
        }
        batch, _ = self.reader.read(self.store, texts, as_of_us=as_of_us)
        return dict(zip(batch.names, batch.matrix.T, strict=True)), batch.absent

    def clear(self) -> None:
        keys = list(self.store.client.scan_iter(f"{self.store.keys.root}:*", count=1000))
        if keys:
            self.store.client.unlink(*keys)
        self.store.close()


@pytest.fixture
def fresh(valkey: str) -> Iterator[Any]:
    """Makes an `Online`; the one before is cleared."""
    made: list[Online] = []

    def make(*declared: FeatureView) -> Online:
        while made:
            made.pop().clear()
        made.append(Online(valkey, declared))
        return made[-1]

    yield make
    while made:
        made.pop().clear()


def offline(
    declared: Sequence[FeatureView], events: pa.Table, keys: dict[str, list[Key]], as_of_us: Any, **options: Any
) -> dict[str, np.ndarray]:
    """Features by name, of all views: those of an entity together."""
    columns: dict[str, np.ndarray] = {}
    for entity in declared[0].source.entities:
        own = [view for view in declared if view.entity is entity]
        encoded = entity.encode(key_table(entity.name, keys[entity.name]))
        instants = np.broadcast_to(np.asarray(as_of_us, np.int64), len(encoded)).copy()
        if own:
            columns |= compute_features(own, events, encoded, instants, **options)
    return columns


def told(view: FeatureView, name: str, *found: Any) -> tuple[Any, ...]:
    """What a failure says; describing a view takes longer than computing it."""
    return view.describe()["features"][name], view.ttl_us, *found


def check_both_engines(data: st.DataObject, fresh: Any) -> None:
    """Several views of two entities, events that came live, in bulk, or both: three answers, one vector."""
    orders = data.draw(order_streams())
    events = orders.take(pa.array(np.argsort(orders["_ingested_us"].to_numpy(), kind="stable")))
    entities = data.draw(st.lists(st.sampled_from([USER.name, SHOP.name]), min_size=2, max_size=4))
    declared = [
        data.draw(views(entity, name=f"view{number}", source=ORDERS, max_features=4))
        for number, entity in enumerate(entities)
    ]
    keys = {USER.name: [PEOPLE[row % 4] for row in range(8)], SHOP.name: [SHOPS[row // 2] for row in range(8)]}
    last_us = max([ORIGIN_US, *times_us(events["at"]).tolist()])
    as_of_us = last_us + data.draw(st.sampled_from([1, US_PER_HOUR, 3 * US_PER_DAY, 11 * US_PER_DAY]))

    online, known = fresh(*declared), unique_events(ORDERS, events)
    in_bulk = data.draw(st.sampled_from([0, events.num_rows // 2, events.num_rows]))
    online.materialize(unique_events(ORDERS, events.slice(0, in_bulk)), as_of_us)
    sent = set(events["event_id"].slice(0, in_bulk).to_pylist())
    online.apply(events.filter(pa.array([each not in sent for each in events["event_id"].to_pylist()], pa.bool_())))
    served, absent = online.read(keys, as_of_us)
    computed = offline(declared, events, keys, as_of_us)

    assert list(served) == [feature.name for view in declared for feature in view]
    assert set(served) == set(computed)
    for place, view in enumerate(declared):
        oracle = Oracle(view, known)
        for row, key in enumerate(keys[view.entity.name]):
            for name, answer in oracle.answer(key, as_of_us).items():
                values = served[f"{view.name}__{name}"][row], computed[f"{view.name}__{name}"][row]
                assert answer.accepts(values[0]), ("online", *told(view, name, key, values, answer))
                assert answer.accepts(values[1]), ("offline", *told(view, name, key, values, answer))
                if absent[row, place]:
                    assert answer.value == 0 or np.isnan(answer.value), told(view, name, key, values, answer)
        for name in view.derived_features:
            np.testing.assert_allclose(
                served[f"{view.name}__{name}"], computed[f"{view.name}__{name}"], rtol=1e-9, atol=1e-3
            )


@quick
@given(data=st.data())
def test_offline_and_online_and_the_oracle_agree_on_views_of_several_entities(
    data: st.DataObject, fresh: Any
) -> None:
    check_both_engines(data, fresh)


@pytest.mark.slow
@pytest.mark.computes
@pytest.mark.timeout(900)
@exhaustive
@given(data=st.data())
def test_offline_and_online_and_the_oracle_agree_at_length(data: st.DataObject, fresh: Any) -> None:
    check_both_engines(data, fresh)


# ── The rules, one by one ───────────────────────────────────────────────────────────

NOON_US = parse_instant_us("2026-03-10T12:00:00Z")
EVENTS: EventSource = SOURCES[USER.name]
ALICE, BOB, NOBODY = (7,), (-1,), (404,)


def table(*rows: tuple[str, Key, int, float | None], ingested_us: Sequence[int] = ()) -> pa.Table:
    """Events: id, whose, when, amount."""
    n = len(rows)
    columns: dict[str, Any] = {
        "user_id": pa.array([key[0] for _, key, _, _ in rows], pa.int64()),
        "event_id": [text for text, *_ in rows],
        "at": pa.array([at_us for _, _, at_us, _ in rows], pa.int64()).cast(TIMESTAMP),
        "amount": pa.array([amount for *_, amount in rows], pa.float64()),
        "quantity": pa.nulls(n, pa.int64()),
        "kind": pa.nulls(n, pa.string()),
        "flagged": pa.nulls(n, pa.bool_()),
    }
    found = pa.table(columns, schema=EVENTS.schema)
    return found.append_column("_ingested_us", pa.array(ingested_us, pa.int64())) if len(ingested_us) else found


def view(ttl: str | None = None, **features: Any) -> FeatureView:
    return FeatureView("facts", version=1, source=EVENTS, features=features, ttl=ttl)


def both(
    fresh: Any, declared: FeatureView, events: pa.Table, people: list[Key], as_of_us: int
) -> list[dict[str, np.ndarray]]:
    """The features of people at an instant: live, from history, and offline."""
    keys = {USER.name: people}
    answers = []
    online = fresh(declared)
    online.apply(events.filter(pc.less(events["at"].cast(pa.int64()), as_of_us)))
    answers.append(online.read(keys, as_of_us)[0])
    online = fresh(declared)
    online.materialize(unique_events(EVENTS, events), as_of_us)
    answers.append(online.read(keys, as_of_us)[0])
    return [*answers, offline([declared], events, keys, as_of_us)]


def test_one_output_row_per_spine_row_in_order(fresh: Any) -> None:
    declared = view(n=Count(window="1d"), total=Sum("amount"))
    events = table(("a", ALICE, NOON_US - 5, 1.5), ("b", BOB, NOON_US - 4, 2.5), ("c", BOB, NOON_US - 3, 4.0))
    people = [BOB, ALICE, NOBODY, BOB, BOB, ALICE, NOBODY]
    for found in both(fresh, declared, events, people, NOON_US):
        assert found["facts__n"].tolist() == [2, 1, 0, 2, 2, 1, 0]
        assert found["facts__total"].tolist() == [6.5, 1.5, 0, 6.5, 6.5, 1.5, 0]
    instants = [NOON_US, NOON_US - 5, NOON_US, NOON_US - 3, NOON_US, NOON_US - 4, 0]
    rows = offline([declared], events, {USER.name: people}, instants)
    assert rows["facts__n"].tolist() == [2, 0, 0, 1, 2, 1, 0]


def test_upper_edge_exclusive(fresh: Any) -> None:
    """Not even a microsecond of the future; the event at the instant itself is the future."""
    declared = view(n=Count(window="1d"), life=Count(), last=Last("amount", window="1h"))
    events = table(("a", ALICE, NOON_US - 1, 1.0), ("b", ALICE, NOON_US, 2.0), ("c", ALICE, NOON_US + 1, 3.0))
    for instant_us, expected in ((NOON_US, [1, 1, 1.0]), (NOON_US + 1, [2, 2, 2.0]), (NOON_US + 2, [3, 3, 3.0])):
        for found in both(fresh, declared, events, [ALICE], instant_us):
            assert [values[0] for values in found.values()] == expected
    # An event that the store has already, but that is still to come, in a tile of its own.
    ahead = table(("d", ALICE, NOON_US + 5 * US_PER_MINUTE, 9.0))
    online = fresh(view(last=Last("amount", window="1h")))
    online.apply(pa.concat_tables([events.slice(0, 1), ahead]))
    assert online.read({USER.name: [ALICE]}, NOON_US)[0]["facts__last"].tolist() == [1.0]


def test_ties_by_event_time_and_tie(fresh: Any) -> None:
    """Of events of one instant a hash of their ids decides, and never which of them came first."""
    ids = [f"e{number}" for number in range(6)]
    ties = dict(zip(ids, tie48(hash64(pa.array(ids))).tolist(), strict=True))
    rows = [(text, ALICE, NOON_US - 7, float(number)) for number, text in enumerate(ids)]
    by_tie = sorted(ids, key=ties.__getitem__)
    expected = [float(ids.index(by_tie[0])), float(ids.index(by_tie[-1]))]
    declared = view(first=First("amount", window="1d"), last=Last("amount"))
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 5, 0, 2, 4, 1]):
        for found in both(fresh, declared, table(*(rows[place] for place in order)), [ALICE], NOON_US):
            assert [values[0] for values in found.values()] == expected
    # The event time comes before the tie.
    later = table(*rows, ("late", ALICE, NOON_US - 6, 50.0), ("soon", ALICE, NOON_US - 8, -50.0))
    for found in both(fresh, declared, later, [ALICE], NOON_US):
        assert [values[0] for values in found.values()] == [-50.0, 50.0]


def test_ttl_the_same_online_and_offline(fresh: Any) -> None:
    """A vector whose last event is older than the ttl is that of nobody, to the microsecond, in both engines."""
    declared = view(ttl="6h", n=Count(window="30d"), total=Sum("amount"), mean=Mean("amount"), top=Max("amount"))
    at_us = NOON_US - US_PER_DAY
    events = table(("a", ALICE, at_us, 4.0), ("b", BOB, at_us - US_PER_HOUR, 4.0))
    end_us = at_us + 6 * US_PER_HOUR
    for instant_us, alive in ((at_us + 1, True), (end_us, True), (end_us + 1, False), (NOON_US, False)):
        for found in both(fresh, declared, events, [ALICE, NOBODY], instant_us):
            nothing = [values[1] for values in found.values()]
            np.testing.assert_array_equal(nothing, [0.0, 0.0, np.nan, np.nan])
            expected = [1.0, 4.0, 4.0, 4.0] if alive else nothing
            np.testing.assert_array_equal([values[0] for values in found.values()], expected)
    online = fresh(declared)
    online.apply(events)
    assert online.read({USER.name: [ALICE, BOB, NOBODY]}, end_us)[1][:, 0].tolist() == [False, True, True]
    assert online.read({USER.name: [ALICE, BOB, NOBODY]}, end_us + 1)[1][:, 0].tolist() == [True, True, True]


def test_known_at_asks_what_was_known_then(fresh: Any) -> None:
    """An event counts from the moment it was taken in, which the rings of that moment show as well."""
    declared = view(n=Count(window="30d"), spread=StdDev("amount"), top=Max("amount"))
    events = table(
        ("a", ALICE, NOON_US - 50, 1.0),
        ("b", ALICE, NOON_US - 40, 5.0),
        ("late", ALICE, NOON_US - 45, 9.0),
        ingested_us=[NOON_US - 49, NOON_US - 39, NOON_US + US_PER_HOUR],
    )
    for known_at_us in (NOON_US, NOON_US + US_PER_HOUR - 1, NOON_US + US_PER_HOUR):
        arrived = events.filter(pc.less_equal(events["_ingested_us"], known_at_us))
        online = fresh(declared)
        online.apply(arrived)
        served = online.read({USER.name: [ALICE]}, NOON_US)[0]
        computed = offline([declared], events, {USER.name: [ALICE]}, NOON_US, known_at_us=known_at_us)
        assert served["facts__n"] == computed["facts__n"] == arrived.num_rows
        assert served["facts__top"] == computed["facts__top"] == (9.0 if arrived.num_rows == 3 else 5.0)
        np.testing.assert_allclose(served["facts__spread"], np.std(arrived["amount"].to_numpy(), ddof=1), rtol=1e-14)
        np.testing.assert_allclose(computed["facts__spread"], served["facts__spread"], rtol=1e-14)


def test_of_nothing_only_count_and_sum_are_something(fresh: Any) -> None:
    wide = {"q": 0.5, "between": (1.0, 10.0)}
    for window in ("1d", None):
        declared = view(
            n=Count(window=window),
            s=Sum("amount", window=window),
            mean=Mean("amount", window=window),
            sd=StdDev("amount", window=window),
            low=Min("amount", window=window),
            kinds=CountDistinct("kind", categories=("a", "b"), window=window),
            mid=Quantile("amount", window=window, **wide),
        )
        events = table(("a", ALICE, NOON_US - 5, None), ("b", ALICE, NOON_US - 4, None))
        for found in both(fresh, declared, events, [ALICE, NOBODY], NOON_US):
            for row, count in ((0, 2.0), (1, 0.0)):
                expected = [count, 0.0, np.nan, np.nan, np.nan, np.nan, np.nan]
                np.testing.assert_array_equal([values[row] for values in found.values()], expected)


def test_a_standard_deviation_keeps_the_small_spread_of_large_numbers(fresh: Any) -> None:
    """Sums of squares would leave nothing of it; and equal numbers deviate by exactly 0."""
    rng = np.random.default_rng(5)
    at_us = NOON_US - rng.integers(1, 20 * US_PER_DAY, 400)
    near = 1e9 + rng.normal(size=400)
    declared = view(sd=StdDev("amount", window="30d"), life=StdDev("amount"))
    events = table(*((f"a{row}", ALICE, int(at_us[row]), float(near[row])) for row in range(400)))
    equal = table(*((f"b{row}", BOB, int(at_us[row]), 0.1 + 1e9) for row in range(400)))
    for found in both(fresh, declared, pa.concat_tables([events, equal]), [ALICE, BOB], NOON_US):
        for values in found.values():
            np.testing.assert_allclose(values[0], np.std(near - 1e9, ddof=1), rtol=1e-6)
            assert values[1] == 0.0


@pytest.mark.parametrize(("q", "error"), [(0.0, 0.02), (0.5, 0.05), (0.9, 0.01), (0.99, 0.1), (1.0, 0.05)])
def test_a_quantile_is_within_its_stated_error_of_the_exact_one(fresh: Any, q: float, error: float) -> None:
    rng = np.random.default_rng(int(1000 * q))
    amounts = np.exp(rng.normal(1.0, 1.0, 600)) * np.where(rng.random(600) < 0.2, -1, 1)
    quantile = Quantile("amount", q=q, between=(0.05, 100.0), relative_error=error, window="6d")
    declared = FeatureView("facts", version=1, source=EVENTS, features={"mid": quantile}, hop="1d")
    at_us = NOON_US - rng.integers(1, 5 * US_PER_DAY, 600)
    events = table(*((f"a{row}", ALICE, int(at_us[row]), float(amounts[row])) for row in range(600)))
    exact = np.quantile(amounts, q, method="lower")
    answers = [found["facts__mid"][0] for found in both(fresh, declared, events, [ALICE], NOON_US)]
    assert len(set(answers)) == 1
    assert abs(answers[0] - exact) <= error * abs(exact) * (1 + 1e-12)
