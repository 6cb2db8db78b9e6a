"""docs/metrics.md has each exported metric as the catalogue has it, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from heliostat.serving.telemetry import CAUSES
from heliostat.telemetry import METRICS, Metric

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def row(metric: Metric) -> str:
    bounds = f"; bounds {metric.bounds[0]:g} to {metric.bounds[-1]:,g}" if metric.bounds else ""
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {metric.unit} | {labels} | {metric.meaning}{bounds} |"


def test_the_page_has_every_metric_with_its_kind_unit_labels_and_meaning() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `heliostat_")]
    wanted = [row(metric) for metric in METRICS]
    assert rows == wanted, "docs/metrics.md wants these rows:\n" + "\n".join(wanted)


def test_labels_and_causes_are_explained() -> None:
    explained = {
        name for line in re.findall(r"^\| (`[a-z`, ]+`) \|", PAGE, re.MULTILINE) for name in line.split(", ")
    }
    assert {f"`{label}`" for metric in METRICS for label in metric.labels} - explained <= {
        f"`{plain}`" for plain in ("model", "version", "feature")
    }
    assert all(f"`{cause}`" in PAGE for cause in CAUSES)


def test_questions_ask_for_what_is_exported() -> None:
    series = {metric.name for metric in METRICS} | {
        f"{metric.name}_{part}"
        for metric in METRICS
        if metric.kind == "histogram"
        for part in ("bucket", "sum", "count")
    }
    asked = set(re.findall(r"ray_(heliostat_\w+)", PAGE)) - {"heliostat_"}
    assert len(asked) > 5
    assert asked <= series
