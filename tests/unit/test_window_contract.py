"""docs/window-contract.md: its example runs, its figures are the code's, and it leaves no function out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from heliostat import Quantile
from heliostat.features import sketches
from heliostat.features.aggregations import FUNCTIONS
from heliostat.features.states import MOST_MEMBERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "window-contract.md").read_text()


def test_the_example_runs_and_is_right() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert example.count("assert ") == 7
    subprocess.run([sys.executable, "-c", example], cwd=ROOT, check=True)


def test_every_function_has_a_row_in_the_table() -> None:
    (table,) = re.findall(r"(\| function .*?)\n\n", PAGE, re.DOTALL)
    named = re.findall(r"`(\w+)\(", "\n".join(line.split(" | ")[0] for line in table.splitlines()[2:]))
    assert sorted(named) == sorted(function.__name__ for function in FUNCTIONS)


def test_the_limits_are_those_of_the_code() -> None:
    assert f"{sketches._MOST_BINS:,} bins" in PAGE
    assert f"{sketches._MOST_RING_BYTES // 1024} KiB" in PAGE
    assert f"at most {MOST_MEMBERS} texts or integers" in PAGE
    for signed, said in ((True, "279 for"), (False, "140 unsigned")):
        assert Quantile("amount", q=0.5, between=(0.01, 10_000), signed=signed).bins.width == int(said.split()[0])
        assert said in PAGE
