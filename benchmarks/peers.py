"""What the benchmarks share: a peer's own environment, fair turns, peak memory, tables of results.

A peer, what a user would pick instead, never enters the project's dependencies: it gets an
environment of its own below ``.bench/`` and runs as a program of its own.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".bench"
RESULTS = ROOT / "benchmarks" / "results"

_MARK = "heliostat-requirements.json"


def python_of(name: str, requirements: Sequence[str]) -> Path:
    """The Python of a peer's own environment, made if it isn't there with the same requirements.

    Args:
        name: Names the folder below ``.bench/``.
        requirements: What pip is asked for, ``duckdb>=1.4``; from whatever index pip is configured with.

    Returns:
        The environment's interpreter.

    Raises:
        subprocess.CalledProcessError: If the environment can't be made or the packages can't be installed.
    """
    folder = ENVIRONMENTS / name
    mark, python = folder / _MARK, folder / "bin" / "python"
    wanted = json.dumps({"python": platform.python_version(), "requirements": sorted(requirements)})
    if mark.exists() and mark.read_text() == wanted and python.exists():
        return python
    start = time.perf_counter()
    print(f"{name}: making .bench/{name} with {', '.join(requirements)} …", flush=True)
    mark.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    if requirements:
        quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
        subprocess.run([str(python), "-m", "pip", "install", *quiet, *requirements], check=True)
    mark.write_text(wanted)
    print(f"{name}: ready after {time.perf_counter() - start:.0f} s", flush=True)
    return python


# ── Memory ──────────────────────────────────────────────────────────────────────────


@dataclass
class PeakMemory:
    """The most memory that a process and all below it held together while a block ran.

    A proportional set size (PSS) is summed, so that pages which several processes share, such as
    Ray's object store, count once. Looking costs the processes some milliseconds: look at runs that
    aren't timed.

    Attributes:
        peak_bytes: The largest sum seen; 0 where the system doesn't tell (it is Linux that does).
    """

    peak_bytes: int = 0

    @classmethod
    @contextlib.contextmanager
    def of(
        cls, pid: int | None = None, *, without: Sequence[int] = (), every_s: float = 0.05
    ) -> Iterator[PeakMemory]:
        """Watch a process tree from a thread until the block ends.

        Args:
            pid: The root; this process by default.
            without: Processes that aren't counted, nor what is below them.
            every_s: Pause between two looks, seconds.
        """
        peak, ended = cls(), threading.Event()

        def watch() -> None:
            while True:
                peak.peak_bytes = max(peak.peak_bytes, tree_bytes(pid, without=without))
                if ended.wait(every_s):
                    return

        thread = threading.Thread(target=watch, name="peak-memory", daemon=True)
        thread.start()
        try:
            yield peak
        finally:
            ended.set()
            thread.join()


def tree_bytes(pid: int | None = None, *, without: Sequence[int] = ()) -> int:
    """The memory that a process and all below it hold now, shared pages counted once, in bytes.

    Args:
        pid: The root; this process by default.
        without: Processes that aren't counted, nor what is below them.
    """
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    total, waiting = 0, [os.getpid() if pid is None else pid]
    while waiting:
        process = waiting.pop()
        if process in without:
            continue
        waiting.extend(children.get(process, ()))
        total += _pss_bytes(process)
    return total


def _pss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


# ── Turns ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Contender:
    """One of those that take turns.

    Attributes:
        work: Does the work once and says how many seconds of it count.
        runs: How many timed runs it gets.
        warm_ups: How many runs it gets before that.
        pid: The root of its processes; None: this process.
        without: Processes below that root that belong to others.
    """

    work: Callable[[], float]
    runs: int = 3
    warm_ups: int = 1
    pid: int | None = None
    without: tuple[int, ...] = ()


@dataclass
class Turns:
    """What one contender needed.

    Attributes:
        seconds: One figure a timed run.
        peak_bytes: Peak memory of its processes together, during the warm-up.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def median_s(self) -> float:
        """The median of the timed runs, seconds."""
        return statistics.median(self.seconds)


def interleaved(contenders: Mapping[str, Contender]) -> dict[str, Turns]:
    """Let contenders take turns, A B A B, so that a machine's slow minute hits all of them.

    Each warms up first; its memory is looked at then, when no clock is running. Progress is printed.

    Args:
        contenders: By name.

    Returns:
        By name, in the order given.
    """
    turns = {name: Turns() for name in contenders}
    for name, contender in contenders.items():
        with PeakMemory.of(contender.pid, without=contender.without) as memory:
            spent = ", ".join(f"{contender.work():.2f} s" for _ in range(contender.warm_ups))
        turns[name].peak_bytes = memory.peak_bytes
        print(f"  {name}: warm-up {spent}, peak {memory.peak_bytes / 2**30:.2f} GiB", flush=True)
    for turn in range(max(contender.runs for contender in contenders.values())):
        for name, contender in contenders.items():
            if turn < contender.runs:
                turns[name].seconds.append(contender.work())
                print(f"  {name}: run {turn + 1}, {turns[name].seconds[-1]:.2f} s", flush=True)
    return turns


def timed(work: Callable[[], object]) -> float:
    """How long a call takes, in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ── Results ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Report:
    """A benchmark's outcome, for people and for programs.

    Attributes:
        title: What was compared, in a line.
        columns: Heads of the table.
        rows: One a contender; numbers are shown with three significant digits.
        notes: What was timed, what was checked, what the reader must know.
        facts: Sizes, versions, cores: what the figures depend on. No names of machines, no paths.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str] = ()
    facts: Mapping[str, object] = field(default_factory=dict)

    def markdown(self) -> str:
        """The report as Markdown."""
        cells = [list(self.columns), *([shown(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[at]) for row in cells) for at in range(len(self.columns))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in cells
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"# {self.title}", "", *lines, "", *notes, "", f"Measured with {facts}."]) + "\n"

    def write(self, name: str, *, folder: Path = RESULTS) -> Path:
        """Write ``<name>.md`` and ``<name>.json``.

        Args:
            name: The benchmark's.
            folder: Made if missing.

        Returns:
            The Markdown file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")
        page = folder / f"{name}.md"
        page.write_text(self.markdown())
        return page


def shown(cell: object) -> str:
    """As tables show it: a number with three significant digits."""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:#.3g}".rstrip(".")
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def facts(*packages: str, **others: object) -> dict[str, object]:
    """What figures depend on: cores, memory, Python, versions of packages, and what the caller adds.

    Args:
        packages: Installed distributions whose versions matter.
        others: Further facts, first in the result.
    """
    found: dict[str, object] = dict(others)
    found["cores"] = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    found["architecture"] = platform.machine()
    found["python"] = platform.python_version()
    found.update((package, importlib.metadata.version(package)) for package in packages)
    return found
