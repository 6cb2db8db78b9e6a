"""Does a gateway's memory stay flat? A million requests, and what its replica holds after each part of them.

    python benchmarks/memory.py                      # a million requests; writes benchmarks/results/memory.{md,json}
    python benchmarks/memory.py --requests 300000    # fewer
    python benchmarks/memory.py --smoke              # seconds: does it run

The fused graph on Ray Serve, as in `benchmarks/serving.py`, every prediction in the durable log. After each part the
log's stream is emptied, as the sink would, so that the online store's memory doesn't grow with it either.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import load
from benchmarks.peers import ROOT, Report, facts
from benchmarks.processes import replica_pid
from benchmarks.served import graph, prepare, project
from heliostat.workspace import Workspace

CUSTOMERS = 2_000
CONCURRENCY = 64
PARTS = 20
_MIB = 2**20
_LONGEST_PART_S = 60.0


def held_bytes(pid: int) -> tuple[int, int]:
    """What a process holds: resident in all, and that part of it which is no file."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    resident, anonymous = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
    return resident, anonymous


def send(url: str, requests: int, seed: int) -> int:
    """Send requests; how many were answered with 200.

    Raises:
        SystemExit: If one wasn't.
    """
    found = load.run(
        f"{url}/predict",
        seconds=_LONGEST_PART_S,
        entities=1,
        population=CUSTOMERS,
        concurrency=CONCURRENCY,
        seed=seed,
        most=requests,
    )
    return int(load.all_of(found)["requests"])


def measure(workspace: Workspace, url: str, requests: int) -> list[tuple[int, int, int]]:
    """After each part: requests so far, and what the replica holds, in bytes."""
    stream = workspace.streams.record_stream("predictions")
    sent = 0
    pid = replica_pid()
    found = [(0, *held_bytes(pid))]
    for part in range(PARTS):
        sent += send(url, requests // PARTS, part)
        workspace.online.client.xtrim(stream, maxlen=0, approximate=False)
        found.append((sent, *held_bytes(pid)))
        print(f"{sent:,} requests: {found[-1][1] / _MIB:.1f} MiB", flush=True)
    if replica_pid() != pid:
        raise SystemExit("the replica was replaced while it was looked at")
    return found


def report(found: list[tuple[int, int, int]]) -> Report:
    """The table, and how much a request left behind once the first fifth had warmed everything up."""
    settled = found[len(found) // 5 :]
    sent, _, anonymous = (np.array(column, dtype=np.float64) for column in zip(*settled, strict=True))
    slope = np.polyfit(sent, anonymous, 1)[0]
    return Report(
        title="Memory of a gateway's replica over many requests",
        columns=["requests", "resident MiB", "of it no file MiB"],
        rows=[(sent, resident / _MIB, anonymous / _MIB) for sent, resident, anonymous in found],
        notes=(
            f"A request left {slope:.1f} bytes behind, by a straight line through all parts but the first fifth.",
            f"One entity of {CUSTOMERS} a request, {CONCURRENCY} connections, every prediction in the durable log.",
            "The log's stream is emptied after each part, as the sink would. No request failed.",
        ),
        facts=facts("ray", "lightgbm", "redis"),
    )


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="as small as it gets, nothing written")
    parser.add_argument("--requests", type=int, default=1_000_000, help="how many")
    given = parser.parse_args()
    with project() as settings, Workspace.open(settings) as workspace:
        prepare(workspace, CUSTOMERS)
        with graph(workspace) as url:
            found = report(measure(workspace, url, 2_000 if given.smoke else given.requests))
    print(found.markdown())
    if not given.smoke:
        print(f"written to {found.write('memory').relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
