"""The runbook knows every alarm there is, and configs/alerts.yaml asks for numbers that are counted."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from heliostat.monitoring.verdict import CHECKS, Severity
from heliostat.telemetry import METRICS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "runbook.md").read_text()
HEADINGS = set(re.findall(r"^### (.+)$", PAGE, re.MULTILINE))
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "configs" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]


def test_every_check_of_a_monitor_has_an_entry() -> None:
    assert set(CHECKS) | {Severity.INSUFFICIENT.value} <= HEADINGS


def test_every_alert_has_an_entry_and_every_entry_an_alert() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(names) > 10
    assert set(names) == {heading for heading in HEADINGS if heading.startswith("Heliostat")}


def test_alerts_ask_for_numbers_that_are_exported_by_labels_that_they_have() -> None:
    series = {}
    for metric in METRICS:
        endings = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        for ending in endings:
            labels = {*metric.labels, "replica"} | ({"le"} if ending == "_bucket" else set())
            series[f"ray_{metric.name}{ending}"] = labels
    for rule in RULES:
        for name, selector in re.findall(r"(ray_heliostat_\w+)(?:\{([^}]*)\})?", rule["expr"]):
            assert name in series, (rule["alert"], name)
            assert set(re.findall(r"(\w+)\s*(?:=|!|~)", selector)) <= series[name], (rule["alert"], selector)
    asked = {metric for rule in RULES for metric in re.findall(r"ray_heliostat_\w+", rule["expr"])}
    assert len(asked) > 10
