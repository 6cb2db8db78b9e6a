from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from heliostat import Count, Entity, EventSource, FeatureView, Max, Sum
from heliostat.clock import US_PER_DAY
from heliostat.errors import MonitoringDataError
from heliostat.monitoring.parity import (
    FeatureParity,
    Match,
    Served,
    compare,
    given_rows,
    parity_findings,
    recompute_from_log,
)
from heliostat.monitoring.verdict import Severity
from heliostat.storage.event_log import EventLog

NAN = float("nan")


def _compare(
    online: list[float], offline: list[float], known_then: list[float] | None = None
) -> tuple[FeatureParity, list[int | None]]:
    """One feature; the rows are about entities 0, 1, …, at instants 100, 101, …"""
    asked: list[int | None] = []

    def recompute(
        keys: pa.Array, at_us: NDArray[np.int64], known_at_us: int | None, _: object
    ) -> Mapping[str, NDArray[np.float64]]:
        asked.append(known_at_us)
        values = np.array(offline if known_at_us is None else known_then or offline)
        assert at_us.tolist() == [100 + key for key in keys.to_pylist()]
        return {"v__x": values[keys.to_numpy()], "v__unused": values[keys.to_numpy()]}

    served = Served(
        pa.array(range(len(online)), pa.int64()),
        np.arange(len(online)) + 100,
        {"v__x": np.array(online, dtype=float)},
        [f"p{row}" for row in range(len(online))],
    )
    return compare(served, recompute)["v__x"], asked


@pytest.mark.parametrize(
    ("online", "offline", "match"),
    [
        (2.0, 2.0, Match.EQUAL),
        (0.1 + 0.2, 0.3, Match.EQUAL),
        (NAN, NAN, Match.BOTH_NULL),
        (NAN, 2.0, Match.ONLINE_NULL),
        (2.0, NAN, Match.OFFLINE_NULL),
        (2.0, 2.001, Match.MISMATCH),
        (0.0, 1e-3, Match.MISMATCH),
    ],
)
def test_each_pair_of_values_is_told_apart(online: float, offline: float, match: Match) -> None:
    parity, _ = _compare([online], [offline])
    assert {kind for kind, count in parity.counts.items() if count} == {match}


def test_every_row_is_counted_once() -> None:
    parity, _ = _compare(
        [1.0, NAN, NAN, 4.0, 5.0, 6.0], [1.0, NAN, 3.0, NAN, 5.5, 7.0], [1.0, NAN, 3.0, NAN, 5.5, 6.0]
    )
    assert parity.n == 6
    assert {match.value: count for match, count in parity.counts.items()} == {
        "equal": 1, "both null": 1, "online null": 1, "offline null": 1, "mismatch": 1, "late": 1,
    }  # fmt: skip
    assert parity.unexplained == 3
    assert parity.largest_difference == 0.5


def test_a_difference_that_nobody_could_know_is_late() -> None:
    parity, asked = _compare([1.0, 2.0], [1.0, 3.0], [1.0, 2.0])
    assert parity.counts[Match.LATE] == 1
    assert parity.unexplained == 0
    assert asked == [None, 101], "only the row that differs is asked again, for its own instant"


def test_an_absent_vector_that_was_not_known_yet_is_late() -> None:
    parity, _ = _compare([NAN], [3.0], [NAN])
    assert parity.counts[Match.LATE] == 1


def test_equal_vectors_are_computed_once() -> None:
    _, asked = _compare([1.0, 2.0], [1.0, 2.0])
    assert asked == [None]


def test_a_mismatch_names_an_example() -> None:
    parity, _ = _compare([1.0, 2.0], [1.0, 9.0])
    assert parity.example == "p1", "by prediction id: a verdict is kept for ever, a key might have to go"


def test_a_feature_that_is_not_declared_any_more_is_named() -> None:
    served = Served(pa.array([1]), np.array([0]), {"old__x": np.array([1.0])}, ["p"])
    with pytest.raises(MonitoringDataError, match="old__x can't be computed again"):
        compare(served, lambda keys, *_: {"v__x": np.zeros(len(keys))})


def test_what_a_request_gave_and_what_derives_from_it_is_left_out() -> None:
    view = FeatureView(
        "v",
        version=1,
        source=purchases,
        features={"count": Count(window="30d"), "spent": Sum("amount", window="30d")},
    )

    @view.derived
    def mean(spent: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
        return spent / count

    @view.derived
    def score(mean: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log1p(mean)

    rows = given_rows([None, (), ["v__spent"], ["v__mean"], ["v__score"]], [view])
    assert {name: np.flatnonzero(each).tolist() for name, each in rows.items()} == {
        "v__spent": [2], "v__mean": [2, 3], "v__score": [2, 3, 4],
    }  # fmt: skip


def test_rows_that_are_left_out_are_neither_compared_nor_asked_again() -> None:
    asked: list[int | None] = []

    def recompute(
        keys: pa.Array, at_us: NDArray[np.int64], known_at_us: int | None, _: object
    ) -> Mapping[str, NDArray[np.float64]]:
        asked.append(known_at_us)
        return {"v__x": np.zeros(len(keys)), "v__y": np.zeros(len(at_us))}

    served = Served(
        pa.array([1, 2], pa.int64()),
        np.array([100, 200]),
        {"v__x": np.array([0.0, 9.0]), "v__y": np.zeros(2), "v__z": np.ones(2)},
        ["a", "b"],
        {"v__x": np.array([False, True]), "v__z": np.array([True, True])},
    )
    compared = compare(served, recompute)
    assert asked == [None]
    assert (compared["v__x"].n, compared["v__x"].left_out, compared["v__x"].unexplained) == (1, 1, 0)
    findings = {each.subject: each for each in parity_findings(compared)}
    assert findings["v__x"].message == "1 equal, 1 given by requests"
    assert set(findings) == {"v__x", "v__y", "left out"}
    assert findings["left out"].evidence["features"] == ["v__z"]


@pytest.mark.parametrize(
    ("wrong", "severity"), [(0, Severity.OK), (1, Severity.WARNING), (2, Severity.WARNING), (3, Severity.ALARM)]
)
def test_more_than_a_trace_of_differences_is_an_alarm(wrong: int, severity: Severity) -> None:
    online, offline = np.zeros(2_000), np.zeros(2_000)
    offline[:wrong] = 1.0
    parity, _ = _compare(online.tolist(), offline.tolist())
    (finding,) = parity_findings({"v__x": parity}, max_mismatch_share=0.001)
    assert finding.severity is severity
    assert finding.evidence["unexplained_rate"] == wrong / 2_000


def test_no_vectors_are_insufficient() -> None:
    parity, _ = _compare([], [])
    (finding,) = parity_findings({"v__x": parity})
    assert finding.severity is Severity.INSUFFICIENT


# ── Against a real event log ────────────────────────────────────────────────────────

customer = Entity("customer", keys={"customer_id": "int64"})
purchases = EventSource(
    "purchases",
    schema=pa.schema(
        {"event_id": pa.int64(), "customer_id": pa.int64(), "at": pa.timestamp("us", "UTC"), "amount": pa.float64()}
    ),
    entity=customer,
    event_time="at",
    event_id="event_id",
)
recent = FeatureView(
    "recent",
    version=1,
    source=purchases,
    features={"count": Count(window="30d"), "spent": Sum("amount", window="30d")},
)
life = FeatureView("life", version=1, source=purchases, features={"largest": Max("amount")})


def _log(folder: Path, events: list[tuple[int, int, int, float]], *, ingested_day: int) -> EventLog:
    log = EventLog(str(folder), n_buckets=4)
    rows = [
        {"event_id": event, "customer_id": who, "at": day * US_PER_DAY, "amount": amount}
        for event, who, day, amount in events
    ]
    log.append(purchases, pa.Table.from_pylist(rows, purchases.schema), ingested_us=ingested_day * US_PER_DAY)
    return log


def test_vectors_are_computed_again_from_the_log_and_late_events_are_explained(tmp_path: Path) -> None:
    _log(tmp_path, [(1, 1, 5, 10.0), (2, 2, 6, 7.0), (3, 3, 7, 5.0)], ingested_day=8)
    # An event of day 9 for customer 2 reached the log on day 12, after its vector was served on day 10.
    log = _log(tmp_path, [(4, 2, 9, 100.0)], ingested_day=12)
    served = Served(
        keys=pa.array([1, 2, 3, 4], pa.int64()),
        at_us=np.full(4, 10 * US_PER_DAY),
        features={
            "recent__count": np.array([1.0, 1.0, 1.0, 0.0]),
            "recent__spent": np.array([10.0, 7.0, 6.0, 0.0]),
            "life__largest": np.array([10.0, 7.0, 5.0, NAN]),
        },
        ids=["a", "b", "c", "d"],
    )
    compared = compare(served, recompute_from_log(log, [recent, life]))
    told = {name: {m.value: c for m, c in each.counts.items() if c} for name, each in compared.items()}
    assert told == {
        "recent__count": {"equal": 3, "late": 1},
        "recent__spent": {"equal": 2, "late": 1, "mismatch": 1},
        "life__largest": {"equal": 2, "late": 1, "both null": 1},
    }
    assert compared["recent__spent"].example == "c"


def test_features_of_a_requests_inputs_are_compared_where_the_log_has_them(tmp_path: Path) -> None:
    view = FeatureView(
        "risk", version=1, source=purchases, features={"largest": Max("amount")}, request={"amount": "float64"}
    )

    @view.derived
    def share(amount: NDArray[np.float64], largest: NDArray[np.float64]) -> NDArray[np.float64]:
        return amount / largest

    log = _log(tmp_path, [(1, 7, 10, 40.0), (2, 8, 11, 10.0)], ingested_day=12)
    amounts = np.array([20.0, 5.0, 1.0])
    served = Served(
        pa.array([7, 8, 8], pa.int64()),
        np.full(3, 20 * US_PER_DAY),
        {"risk__share": np.array([0.5, 0.6, 0.1])},
        ["a", "b", "c"],
        given_rows([None] * 3, [view], brought=np.array([True, True, False])),
        {"amount": amounts},
    )
    parity = compare(served, recompute_from_log(log, [view["share"]]))["risk__share"]
    assert (parity.counts[Match.EQUAL], parity.counts[Match.MISMATCH], parity.left_out) == (1, 1, 1)
    assert parity.example == "b"
