"""How much of what a number of requests needs: results of the benchmarks -> docs/sizing.md.

python benchmarks/sizing.py             # writes the tables anew; nothing is measured
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pages import between, markdown, result, rewrite
from benchmarks.peers import RESULTS, ROOT, shown
from benchmarks.request_parts import HAPROXY, VALKEY

PAGE = ROOT / "docs" / "sizing.md"
BEGIN, END = "<!-- measured: written by benchmarks/sizing.py -->", "<!-- end -->"
SIZES = (1, 100)
LOAD = 0.6
"""The share of a replica's processor time that is planned with: queues are short, and another's share fits in."""
NEEDED = 1_000
"""Requests a second that are planned for."""
_DAY_S = 86_400
_GIB, _KIB = 2**30, 2**10


def requests(folder: Path) -> list[list[str]]:
    """What a request of each size costs, and what so many a second need."""
    cells = {(row["entities"], row["concurrency"]): row for row in result("serving", folder)}
    parts = {row["µs a request"]: row for row in result("serving_parts", folder)}
    takes = {row["what"]: row["how much"] for row in result("footprint", folder)}
    columns = {size: f"{size} {'entity' if size == 1 else 'entities'}, 16 at once" for size in SIZES}
    whole = {size: parts["together"][columns[size]] for size in SIZES}
    ingress, store = ({size: parts[part][columns[size]] for size in SIZES} for part in (HAPROXY, VALKEY))
    replica = {size: whole[size] - ingress[size] - store[size] for size in SIZES}
    row_bytes = {
        size: takes[f"prediction in the stream, {columns[size].replace(',', ' a request,')}"] for size in SIZES
    }
    kept = takes["prediction in its table"]

    def line(what: str, values: Mapping[int, str]) -> list[str]:
        return [what, *(values[size] for size in SIZES)]

    def each(what: str, value: Mapping[int, float]) -> list[str]:
        return line(what, {size: shown(float(value[size])) for size in SIZES})

    needed = {size: math.ceil(NEEDED * replica[size] / 1e6 / LOAD) for size in SIZES}
    held_mib = takes["gateway replica, after load: resident"]
    lines = [["", *(f"{size} {'entity' if size == 1 else 'entities'} a request" for size in SIZES)]]
    for at in (1, 16, 64):
        ours = {size: (cells[size, at]["req/s Heliostat"], cells[size, at]["p99 ms Heliostat"]) for size in SIZES}
        told = {size: f"{shown(pace)}, {shown(p99)} ms" for size, (pace, p99) in ours.items()}
        lines.append(line(f"one replica, {at} at once: requests/s, p99", told))
    return [
        *lines,
        each("processor time in the replica, µs a request", replica),
        each("in HAProxy, µs", ingress),
        each("in the online store's server, µs", store),
        line(f"**replicas for {NEEDED:,} requests/s**, each at {LOAD:.0%}", {s: str(needed[s]) for s in SIZES}),
        each(
            "**cores for them**, HAProxy and server, all at that", {s: NEEDED * whole[s] / 1e6 / LOAD for s in SIZES}
        ),
        each("their memory, GiB", {s: needed[s] * held_mib / _KIB for s in SIZES}),
        each("prediction log: bytes a prediction in the stream", row_bytes),
        each(
            "in the stream if the sink is away for a minute, GiB",
            {s: NEEDED * s * 60 * row_bytes[s] / _GIB for s in SIZES},
        ),
        each("in the table, GiB a day", {s: NEEDED * s * _DAY_S * kept / _GIB for s in SIZES}),
    ]


def store(folder: Path) -> list[list[str]]:
    """What entities and events need."""
    rows = result("footprint", folder)
    lines = [["what", "takes", "a million of them, GiB"]]
    for row in rows:
        if row["unit"].startswith("bytes"):
            what, of = row["what"], row["unit"].removeprefix("bytes ")
            lines.append([what, f"{shown(row['how much'])} bytes {of}", shown(row["how much"] * 1e6 / _GIB)])
    return lines


def memory(folder: Path) -> list[list[str]]:
    """What processes and versions hold."""
    rows = [row for row in result("footprint", folder) if not row["unit"].startswith("bytes")]
    return [["what", "holds"], *([row["what"], f"{shown(row['how much'])} {row['unit']}"] for row in rows)]


def events(folder: Path) -> list[list[str]]:
    """What one replica takes in."""
    rows = [row for row in result("ingestion", folder) if row["what"] == "POST /events"]
    best = {
        row["events a batch"]: row
        for row in sorted(rows, key=lambda row: row["events/s"])
        if row["concurrency"] in (4, 16)
    }
    head = ["events a request", "events/s of one replica", "p99"]
    return [
        head,
        *([str(n), shown(row["events/s"]), f"{shown(row['p99 ms'])} ms"] for n, row in sorted(best.items())),
    ]


TABLES = {"requests": requests, "store": store, "memory": memory, "events": events}


def written(page: str, folder: Path = RESULTS) -> str:
    """A page with its tables as the results have them: each between ``BEGIN name`` and ``END``."""
    for name, lines in TABLES.items():
        page = between(page, BEGIN.replace("measured", f"measured {name}"), END, markdown(lines(folder)))
    return page


def main() -> int:
    """Run as a program."""
    rewrite(PAGE, written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
