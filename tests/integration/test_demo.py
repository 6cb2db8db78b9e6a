"""The demo ends cleanly when it is interrupted. That it runs to its end is what `make demo` in CI shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from heliostat import cluster

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("last_step", ["Start the embedded store and Ray", "Register the declarations"])
def test_an_interrupted_demo_leaves_nothing_running(home: Path, last_step: str) -> None:
    demo = subprocess.Popen(
        [sys.executable, "jobs/demo.py", "--home", str(home / "demo")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert demo.stdout is not None
    told = ""
    for line in demo.stdout:
        told += line
        if last_step in line:
            break
    head = json.loads((home / "demo" / "ray-head.json").read_bytes())
    started = cluster._members(Path(head["folder"]))
    assert len(started) > 3, told
    demo.send_signal(signal.SIGINT)
    rest, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, told + rest
    assert "Stop everything" in rest
    limit = time.monotonic() + 5
    while any(cluster._alive(pid) for pid in started) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not [pid for pid in started if cluster._alive(pid)]


def test_a_folder_that_is_no_demos_is_not_emptied(home: Path) -> None:
    (home / "precious").write_text("x")
    done = subprocess.run(
        [sys.executable, "jobs/demo.py", "--home", str(home)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "isn't a demo's folder" in done.stderr
    assert (home / "precious").exists()
