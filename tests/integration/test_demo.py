"""The demo ends cleanly when it is interrupted. That it runs to its end is what `make demo` in CI shows."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from heliostat import cluster

ROOT = Path(__file__).parents[2]


Demo = subprocess.Popen[str]


@contextlib.contextmanager
def demo_until(step: str, home: Path, *, before: str = "") -> Iterator[tuple[Demo, list[int]]]:
    """A demo that has just told a step, and what it has started."""
    demo = subprocess.Popen(
        ["sh", "-c", f"{before} exec '{sys.executable}' jobs/demo.py --home '{home / 'demo'}'"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert demo.stdout is not None
    told = ""
    try:
        for line in demo.stdout:
            told += line
            if step in line:
                break
        started = cluster._members(Path(json.loads((home / "demo" / "ray-head.json").read_bytes())["folder"]))
        assert len(started) > 3, told
        yield demo, started
    finally:
        demo.kill()
        demo.wait()
        cluster.stop_head(home / "demo")


def alive_after(seconds: float, started: list[int]) -> list[int]:
    """Those that still run after a while."""
    limit = time.monotonic() + seconds
    while any(cluster._alive(pid) for pid in started) and time.monotonic() < limit:
        time.sleep(0.1)
    return [pid for pid in started if cluster._alive(pid)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "number", "before"),
    [
        ("Start the embedded store and Ray", signal.SIGINT, ""),
        # As in the background of a script.
        ("Register the declarations", signal.SIGTERM, "trap '' INT TERM;"),
    ],
)
def test_an_interrupted_demo_leaves_nothing_running(
    home: Path, step: str, number: signal.Signals, before: str
) -> None:
    with demo_until(step, home, before=before) as (demo, started):
        demo.send_signal(number)
        rest, _ = demo.communicate(timeout=300)
        assert demo.returncode == 130, rest
        assert "Stop everything" in rest
        assert alive_after(60, started) == []


@pytest.mark.slow
def test_a_demo_that_nobody_reads_leaves_nothing_running(home: Path) -> None:
    with demo_until("Start the embedded store and Ray", home) as (demo, started):
        assert demo.stdout is not None
        demo.stdout.close()
        assert demo.wait(timeout=300) != 0
        assert alive_after(60, started) == []


def test_a_folder_that_is_no_demos_is_not_emptied(home: Path) -> None:
    (home / "precious").write_text("x")
    done = subprocess.run(
        [sys.executable, "jobs/demo.py", "--home", str(home)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "isn't a demo's folder" in done.stderr
    assert (home / "precious").exists()
