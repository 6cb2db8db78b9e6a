"""configs/alerts.yaml, evaluated by Prometheus itself: each alert rings when it should, and only then."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parent
RULES = HERE.parents[1] / "configs" / "alerts.yaml"
CASES = ("alerts.yaml", "alerts_of_a_week.yaml")
Ran = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def promtool() -> Callable[..., Ran]:
    """Runs Prometheus' own tool, where it is."""
    found = shutil.which("promtool") or shutil.which("promtool", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("there is no promtool: `make services` gets it from Debian's packages")

    def run(*words: str | Path, cwd: Path | None = None) -> Ran:
        return subprocess.run([found, *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=120)

    return run


def with_rules(folder: Path, change: Callable[[dict[str, object]], object] | None = None) -> list[str]:
    """The cases in a folder beside the project's rules, with each rule changed."""
    rules = yaml.safe_load(RULES.read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if change is not None:
                change(rule)
    (folder / "alerts-of-the-project.yaml").write_text(yaml.safe_dump(rules))
    for name in CASES:
        shutil.copy(HERE / name, folder)
    return list(CASES)


def test_prometheus_takes_the_rules(promtool: Callable[..., Ran]) -> None:
    done = promtool("check", "rules", RULES)
    assert (done.returncode, "14 rules found" in done.stdout) == (0, True), done.stdout + done.stderr


def test_each_alert_rings_when_it_should_and_only_then(promtool: Callable[..., Ran], tmp_path: Path) -> None:
    done = promtool("test", "rules", *with_rules(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("expression", ["vector(0) > 1", "vector(1) > 0"], ids=["never", "always"])
def test_the_cases_notice_an_alert_that_rings_never_or_always(
    expression: str, promtool: Callable[..., Ran], tmp_path: Path
) -> None:
    names = with_rules(tmp_path, lambda rule: rule.update(expr=expression))
    done = promtool("test", "rules", *names, cwd=tmp_path)
    alerts = [rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert done.returncode == 1
    unnoticed = [name for name in alerts if f"alertname: {name}," not in done.stdout + done.stderr]
    assert unnoticed == []
