from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from heliostat.clock import ManualClock
from heliostat.errors import ExperimentDataError
from heliostat.experiments.analysis import aggregate, analyze
from heliostat.experiments.rollout import Rollout
from heliostat.features.definitions import Entity
from heliostat.monitoring.exposures import Split, SplitReport, _exposures, find_split
from heliostat.monitoring.served import ServedRows
from heliostat.storage.catalog import Catalog
from heliostat.storage.catalog_tables import RouteRow, VersionRow


@pytest.fixture
def history(tmp_path: Path) -> tuple[RouteRow, ...]:
    """At 10 version 1 serves; at 20 `spring` starts, at 30 it is widened, at 40 it ends; at 50 `autumn` starts."""
    clock = ManualClock()
    with Catalog.open(f"sqlite:///{tmp_path / 'catalog.db'}") as catalog:
        with catalog.write() as rows:
            for version in (1, 2):
                rows.add_version(VersionRow("churn", version, f"a{version}", {}, {}, {}, None, {}, 0))
        rollout = Rollout(catalog, clock, lambda model, document: None)  # noqa: ARG005
        clock.set(10)
        rollout.serve("churn", 1, reason="first")
        clock.set(20)
        rollout.start_split("churn", experiment="spring", control=1, challenger=2, weight=0.5, coverage=0.1)
        clock.set(30)
        rollout.widen("churn", 0.5)
        clock.set(40)
        rollout.stop("churn", reason="enough")
        clock.set(50)
        rollout.start_split("churn", experiment="autumn", control=1, challenger=2, weight=0.2)
        return rollout.history("churn")


def test_a_widened_split_is_one_split_from_its_start_to_its_end(history: tuple[RouteRow, ...]) -> None:
    split = find_split("churn", history, "spring")
    assert (split.from_us, split.until_us) == (20, 40)
    assert split.revisions == (2, 3)
    assert split.route.coverage == 0.5


def test_forced_shadow_and_fallback_answers_are_no_exposures(history: tuple[RouteRow, ...]) -> None:
    variants = ["control", "challenger", "forced:challenger", "shadow", "outside", "challenger"]
    table = pa.table(
        {
            "entity": [str(n) for n in range(6)],
            "revision": [3] * 6,
            "variant": variants,
            "version": [1, 2, 2, 2, 1, 2],
            "source": ["model"] * 5 + ["fallback"],
        }
    )
    entity = Entity("customer", keys={"customer_id": "int64"})
    found = _exposures(ServedRows(table, entity), find_split("churn", history, "spring"))
    assert found.table.column("entity").to_pylist() == ["0", "1"]


def test_without_a_name_it_is_the_newest_and_it_may_be_running(history: tuple[RouteRow, ...]) -> None:
    split = find_split("churn", history, None)
    assert split.route.salt == "churn/autumn"
    assert (split.from_us, split.until_us) == (50, None)


def test_an_unknown_split_is_refused_with_those_that_ran(history: tuple[RouteRow, ...]) -> None:
    with pytest.raises(ExperimentDataError, match="no split 'summer'; splits so far: spring, autumn"):
        find_split("churn", history, "summer")


def test_a_model_that_never_split_is_refused(history: tuple[RouteRow, ...]) -> None:
    with pytest.raises(ExperimentDataError, match="has had no split"):
        find_split("churn", history[:1], None)


def _report(split: Split, *, treated: int) -> SplitReport:
    random = np.random.default_rng(1)
    variants = np.array(["control"] * 1_000 + ["challenger"] * treated)
    n = len(variants)
    units = aggregate(
        np.arange(n), variants, np.zeros(n, dtype=np.int64), random.normal(size=n), random.normal(size=n)
    )
    analysis = analyze(units, weights={"control": 0.5, "challenger": 0.5}, control="control", treatment="challenger")
    return SplitReport(split, "churned", 60, n, (analysis,))


def test_the_report_names_each_interval_for_what_it_is(history: tuple[RouteRow, ...]) -> None:
    text = "\n".join(_report(find_split("churn", history, "spring"), treated=1_010).lines())
    assert "challenger against control: UNDECIDED" in text
    assert text.count("(always-valid, 95%)") == 2
    assert text.count("(fixed-horizon, 95%)") == 1
    assert "crossed" not in text


def test_the_report_of_a_broken_split_says_that_nothing_may_be_concluded(history: tuple[RouteRow, ...]) -> None:
    report = _report(find_split("churn", history, "spring"), treated=1_300)
    text = "\n".join(report.lines())
    assert "BLOCKED" in text
    assert "MISMATCH, nothing may be concluded" in text
    assert report.to_dict()["analyses"][0]["conclusion"] == "blocked"


def test_entities_that_met_both_variants_are_reported(history: tuple[RouteRow, ...]) -> None:
    report = _report(find_split("churn", history, "spring"), treated=1_000)
    crossed = replace(report, analyses=(replace(report.analyses[0], crossed=7),))
    assert "7 entities met several variants" in "\n".join(crossed.lines())
