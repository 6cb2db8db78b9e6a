"""What README says is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_sees_only_what_was_known() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.splitlines()) <= 22
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT, check=True)
    first, second = done.stdout.splitlines()
    assert "'activity__visits_30d': array([1.])" in first
    assert "'activity__avg_minutes_30d': array([10.])" in first
    assert "'activity__days_since': array([10.])" in first
    assert "'activity__visits_30d': array([2.])" in second
    assert "'activity__avg_minutes_30d': array([15.])" in second


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    targets = re.findall(r"^make (\S+)", block, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_link_to_a_file_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_file_that_the_docs_name_exists() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(
            r"\b((?:jobs|deployments|configs|benchmarks|tests)/[\w/.-]+\.(?:py|yaml))\b", page.read_text()
        ):
            assert "/yours/" in target or (ROOT / target).exists(), f"{page.name} names {target}"
