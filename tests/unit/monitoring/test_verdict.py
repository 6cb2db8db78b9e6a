from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import MonitoringDataError
from heliostat.monitoring.verdict import (
    ATTENTION_EXIT_CODE,
    CHECKS,
    Finding,
    Severity,
    Verdict,
    exit_code,
    latest,
    overall,
    record,
)
from heliostat.storage.catalog import Catalog

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
findings = st.builds(
    Finding, st.text(), st.sampled_from(Severity), st.text(), st.dictionaries(st.text(), json_values, max_size=4)
)
verdicts = st.builds(
    Verdict,
    check=st.sampled_from(CHECKS),
    model=st.text(min_size=1),
    version=st.none() | st.integers(1, 99),
    at_us=st.integers(0, 2**53),
    from_us=st.integers(0, 2**53),
    until_us=st.integers(0, 2**53),
    n_rows=st.integers(0, 10**9),
    findings=st.lists(findings, max_size=4).map(tuple),
)


def _verdict(*severities: Severity, check: str = "drift", at_us: int = 0, version: int | None = 1) -> Verdict:
    found = tuple(Finding(f"f{index}", each, "moved") for index, each in enumerate(severities))
    return Verdict(check, "churn", version, at_us, 0, 86_400_000_000, 1_234, found)


@given(verdicts)
def test_a_verdict_survives_json(verdict: Verdict) -> None:
    text = json.dumps(verdict.to_dict(), allow_nan=False)
    assert Verdict.from_dict(json.loads(text)) == verdict


def test_the_status_is_the_worst_finding_and_comes_first() -> None:
    verdict = _verdict(Severity.OK, Severity.ALARM, Severity.WARNING)
    assert verdict.status is Severity.ALARM
    assert [finding.severity for finding in verdict.findings] == [Severity.ALARM, Severity.WARNING, Severity.OK]


def test_nothing_looked_at_is_not_ok() -> None:
    assert _verdict().status is Severity.INSUFFICIENT
    assert overall([]) is Severity.INSUFFICIENT


@pytest.mark.parametrize(
    ("worst", "strict", "expected"),
    [
        (Severity.OK, False, 0),
        (Severity.OK, True, 0),
        (Severity.INSUFFICIENT, False, 0),
        (Severity.INSUFFICIENT, True, ATTENTION_EXIT_CODE),
        (Severity.WARNING, False, ATTENTION_EXIT_CODE),
        (Severity.ALARM, False, ATTENTION_EXIT_CODE),
    ],
)
def test_the_exit_code_follows_the_worst_verdict(worst: Severity, strict: bool, expected: int) -> None:
    assert exit_code([_verdict(Severity.OK), _verdict(worst)], strict=strict) == expected


def test_strictness_sees_an_insufficient_check_beside_good_ones() -> None:
    assert exit_code([_verdict(Severity.INSUFFICIENT), _verdict(Severity.OK)], strict=True) == ATTENTION_EXIT_CODE


def test_numpy_figures_become_plain_and_nan_becomes_none() -> None:
    finding = Finding("x", Severity.OK, "", {"a": np.float64(0.5), "b": np.nan, "c": np.arange(2)})
    assert finding.evidence == {"a": 0.5, "b": None, "c": [0, 1]}


def test_an_unknown_check_is_refused_with_the_known_ones() -> None:
    with pytest.raises(MonitoringDataError, match="use one of drift, performance, quality, parity"):
        _verdict(check="vibes")


def test_a_document_of_something_else_is_refused() -> None:
    with pytest.raises(MonitoringDataError, match="run the monitor again"):
        Verdict.from_dict({"check": "drift"})


def test_the_report_shows_what_is_wrong_and_counts_what_is_fine() -> None:
    lines = list(_verdict(Severity.OK, Severity.OK, Severity.OK, Severity.ALARM).lines())
    assert lines[0].startswith("drift: ALARM  churn version 1, 1,234 rows, 1970-01-01T00:00:00Z")
    assert lines[1:] == ["  alarm        f3: moved", "  ok           3 more"]


def test_the_newest_verdict_of_a_check_and_version_holds(tmp_path: Path) -> None:
    with Catalog.open(f"sqlite:///{tmp_path / 'catalog.db'}") as catalog:
        assert latest(catalog, "churn", "drift") is None
        old, new = _verdict(Severity.ALARM, at_us=1), _verdict(Severity.OK, at_us=2)
        for verdict in (old, new, _verdict(Severity.ALARM, check="quality", at_us=3), _verdict(version=2, at_us=4)):
            record(catalog, verdict)
        assert latest(catalog, "churn", "drift", version=1) == new
        assert latest(catalog, "churn", "drift") == _verdict(version=2, at_us=4)
