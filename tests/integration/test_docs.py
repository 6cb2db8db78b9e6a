"""What docs/ show is run: the example of "bring your own data", and every command of "how it works"."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from heliostat.settings import Settings

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def _page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def environment(settings: Settings, home: Path) -> dict[str, str]:
    """A project of the test's own; it is the first of May 2026."""
    mine = settings.environment() | {"HELIOSTAT_CLOCK__REPLAY_FROM": "2026-05-01", "HELIOSTAT_HOME": str(home)}
    path = f"{ROOT / 'platform'}{os.pathsep}{ROOT}"
    return {**os.environ, **mine, "PYTHONPATH": path, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def test_from_csv_to_features_in_15_lines(environment: dict[str, str], tmp_path: Path) -> None:
    page = _page("bring-your-own-data.md")
    (rides,) = _blocks(page, "csv")
    examples = _blocks(page, "python")
    assert len([line for line in examples[0].splitlines() if line]) <= 15
    (tmp_path / "rides.csv").write_text(rides)
    done = subprocess.run(
        [sys.executable, "-c", "".join(examples)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert said[0].startswith("rides: 3 new events, 0 known already, 0 rejected, from 1 files")
    assert "0 1 2.0 16.25 10.2" in said[2], "two rides in 30 days, the last one on the 20th"
    assert "1 2 1.0 8.00" in said[3]
    assert "0 1 2026-04-10 1.0 12.50" in said[5], "on the 10th there was one ride"
    assert "1 1 2026-04-25 2.0 16.25" in said[6]
    assert "2 2 2026-04-25 0.0 NaN NaN" in said[7], "and the ride of the 28th hasn't happened"
    assert said[9:] == ["0 1 2.0 0.1 False False", "1 2 1.0 0.7 False False", "2 3 0.0 NaN True True"]


@pytest.mark.slow
def test_every_command_of_how_it_works_runs_in_its_order(environment: dict[str, str], tmp_path: Path) -> None:
    page = _page("how-it-works.md")
    commands = [line for block in _blocks(page, "bash") for line in block.splitlines() if line]
    assert commands
    said: dict[str, str] = {}
    for command in commands:
        line = command.replace("purchases.parquet", str(tmp_path / "purchases.parquet"))
        done = subprocess.run(
            ["bash", "-c", line],
            env={**environment, "HELIOSTAT_CLOCK__REPLAY_FROM": "1998-07-01"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
        said[command] = done.stdout
    assert "+ view recent_purchases@1" in said["heliostat plan"]
    assert "events in" in said["heliostat plan"]
