"""The quickstart's commands, in its order, on a project of the test's own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from heliostat.ports import free_ports

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quickstart.md").read_text()
BIN = Path(sys.executable).parent

# Set up by make already; the environment is given below.
NOT_RUN = ("make setup", "source .venv", "export HELIOSTAT_CONFIG")


def commands() -> list[str]:
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line
    ]
    return [line for line in lines if not line.startswith(NOT_RUN)]


@pytest.fixture
def environment(session_home: Path) -> Iterator[dict[str, str]]:
    (port,) = free_ports("127.0.0.1", 1)
    home = session_home / "quickstart"
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HELIOSTAT_CONFIG": "configs/local.yaml",
        "HELIOSTAT_HOME": str(home),
        "HELIOSTAT_SERVING__PORT": str(port),
    }
    yield environment
    subprocess.run([str(BIN / "heliostat"), "down"], env=environment, cwd=ROOT, check=False, capture_output=True)
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_every_command_of_the_quickstart_works_in_its_order(environment: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl isn't installed here")
    said: dict[str, str] = {}
    for command in commands():
        line = command.replace("purchases.parquet", str(tmp_path / "purchases.parquet"))
        line = line.replace("8000", environment["HELIOSTAT_SERVING__PORT"])
        done = subprocess.run(
            ["bash", "-c", line], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        said[command] = done.stdout
        allowed = (0, 10, 20) if "monitor_model" in line or "retrain_model" in line else (0,)
        assert done.returncode in allowed, f"{command}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
    answers = [json.loads(text) for command, text in said.items() if command.startswith("curl")]
    assert answers[0]["model_version"] == 1
    assert len(answers[0]["predictions"]) == 2
    assert answers[1]["accepted"] == 1
    assert "answered and logged, stopped" in said["heliostat down"]
