"""The processes of a server that is measured: which they are, and the processor time that they have had.

Processor time is what a request costs, whoever else works on the machine meanwhile: far steadier than requests/s.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """A process and all below it, the nearest first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            children.setdefault(int(_stat(entry)[1]), []).append(int(entry.name))
    found = [pid]
    for each in found:
        found.extend(children.get(each, ()))
    return found


def titled(beginning: bytes, *, holding: bytes = b"") -> list[int]:
    """The processes below this one whose command line begins so, and holds that besides."""
    found = []
    for pid in tree(os.getpid()):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
            program = title.partition(b"\0")[0].rpartition(b"/")[2]
            if holding in title and (title.startswith(beginning) or program.startswith(beginning)):
                found.append(pid)
    return found


def replica_pid(application: str = "heliostat") -> int:
    """The process of an application's gateway.

    Raises:
        SystemExit: If this program started none, or several.
    """
    found = titled(f"ray::ServeReplica:{application}:".encode(), holding=b":Gateway")
    if len(found) != 1:
        raise SystemExit(f"{application} has {len(found)} gateways; one alone can be looked at")
    return found[0]


def cpu_s(pids: Iterable[int]) -> float:
    """Processor time that processes have had since they began, all threads, user and system, seconds.

    One that has ended counts as 0: ask about those that go on.
    """
    return sum(_cpu_s(Path(f"/proc/{pid}")) for pid in pids)


def threads_cpu_s(pid: int) -> dict[int, float]:
    """The same of each thread of a process, by its id."""
    return {int(thread.name): _cpu_s(thread) for thread in Path(f"/proc/{pid}/task").iterdir()}


def _cpu_s(entry: Path) -> float:
    with contextlib.suppress(OSError):
        stat = _stat(entry)
        return (int(stat[11]) + int(stat[12])) / _TICKS_PER_S
    return 0.0


def _stat(entry: Path) -> list[str]:
    """The fields of a process's, or a thread's, ``stat`` behind its name: the state is the first."""
    return (entry / "stat").read_text().rpartition(")")[2].split()
