"""How quickly events come in: over HTTP, without it, and in bulk from files.

    python benchmarks/ingestion.py            # three minutes; writes benchmarks/results/ingestion.{md,json}
    python benchmarks/ingestion.py --smoke    # seconds: does it run, and is each event where it should be

Live events go the whole way: checked, de-duplicated, into the rings of two views and into a
durable stream, in the server's one atomic script, before the answer leaves. Bulk ingestion is
`jobs/ingest_events.py` on one Parquet file: checked, de-duplicated, bucketed, sorted, committed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import load
from benchmarks.peers import ROOT, PeakMemory, Report, facts
from benchmarks.served import graph, project
from heliostat.clock import US_PER_DAY, format_instant
from heliostat.ingestion.checking import EventCheck
from heliostat.ingestion.files import read_ahead, read_batches
from heliostat.ingestion.intake import Intake
from heliostat.schema import TIMESTAMP
from heliostat.settings import Settings
from heliostat.workspace import Workspace

SOURCE, VIEW = "purchases", "recent_purchases"
CUSTOMERS = 50_000
_ANSWERS_A_SECOND = 2_500


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        batches: Events a request, one row each.
        concurrency: Connections, one row each.
        seconds: A run, at most.
        rounds: Runs of each cell.
        bulk_events: Rows of the file.
    """

    batches: tuple[int, ...] = (1, 10, 100, 1_000)
    concurrency: tuple[int, ...] = (1, 4, 16)
    seconds: float = 1.0
    rounds: int = 3
    bulk_events: int = 10_000_000


SMOKE = Plan(batches=(1, 50), concurrency=(2,), seconds=0.2, rounds=1, bulk_events=20_000)


@dataclass
class Cell:
    """What one row of the table is made of, a figure a run."""

    events_per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)

    def row(self, what: str, batch: int, concurrency: int) -> list[object]:
        """The row, in medians."""
        figures = [statistics.median(each) for each in (self.events_per_s, self.p50_ms, self.p99_ms)]
        return [what, batch, concurrency, *figures]


class Events:
    """Events that nobody has seen before, of random customers in the last month."""

    def __init__(self, now_us: int) -> None:
        self._now_us, self._rng = now_us, np.random.default_rng(7)
        self.made = 0

    def batch(self, count: int) -> list[dict[str, Any]]:
        """The next so many events."""
        first, self.made = self.made, self.made + count
        customers = self._rng.integers(1, CUSTOMERS + 1, count).tolist()
        times_us = self._now_us - self._rng.integers(1, 30 * US_PER_DAY, count)
        times = pc.strftime(pa.array(times_us, pa.timestamp("us")), "%Y-%m-%dT%H:%M:%SZ").to_pylist()
        amounts = np.round(self._rng.gamma(2.0, 15.0, count), 2).tolist()
        return [
            {
                "event_id": first + at,
                "customer_id": customer,
                "purchased_at": at_text,
                "quantity": 1,
                "amount": amount,
            }
            for at, (customer, at_text, amount) in enumerate(zip(customers, times, amounts, strict=True))
        ]


def _percentiles(latencies_ms: list[float]) -> tuple[float, float]:
    return float(np.percentile(latencies_ms, 50)), float(np.percentile(latencies_ms, 99))


# ── Live ────────────────────────────────────────────────────────────────────────────


def without_http(workspace: Workspace, events: Events, plan: Plan) -> Iterator[list[object]]:
    """The intake alone, one caller: a row for each size of batch."""
    intake = Intake.of(workspace, workspace.online)
    intake.submit(SOURCE, events.batch(100))
    for size in plan.batches:
        cell = Cell()
        for _ in range(plan.rounds):
            latencies_ms, spent_s = list[float](), 0.0
            while spent_s < plan.seconds / 2:
                batch = events.batch(size)
                begin = time.perf_counter()
                intake.submit(SOURCE, batch)
                taken_s = time.perf_counter() - begin
                spent_s += taken_s
                latencies_ms.append(taken_s * 1e3)
            p50_ms, p99_ms = _percentiles(latencies_ms)
            cell.events_per_s.append(size * len(latencies_ms) / spent_s)
            cell.p50_ms.append(p50_ms)
            cell.p99_ms.append(p99_ms)
        yield _told(cell.row("intake, without HTTP", size, 1))


def over_http(url: str, events: Events, plan: Plan, folder: Path) -> Iterator[list[object]]:
    """`POST /events` from a process of its own: a row for each size of batch and number of connections."""
    for size in plan.batches:
        for concurrency in plan.concurrency:
            cell = Cell()
            for turn in range(-1, plan.rounds):  # the first turn warms up
                seconds = plan.seconds if turn >= 0 else plan.seconds / 4
                bodies = folder / "bodies"
                # More than anybody could send: no event comes twice.
                count = max(20, int(seconds * _ANSWERS_A_SECOND / (1 + size / 15)))
                made = events.batch(size * count)
                with bodies.open("wb") as sink:
                    for begin in range(0, len(made), size):
                        sink.write(orjson.dumps({"source": SOURCE, "events": made[begin : begin + size]}) + b"\n")
                found = _load(f"{url}/events", bodies, concurrency, seconds)
                if turn >= 0:
                    cell.events_per_s.append(size * found["requests_per_s"])
                    cell.p50_ms.append(found["p50_ms"])
                    cell.p99_ms.append(found["p99_ms"])
            yield _told(cell.row("POST /events", size, concurrency))


def _load(url: str, bodies: Path, concurrency: int, seconds: float) -> dict[str, float]:
    return load.all_of(load.run(url, seconds=seconds, bodies=bodies, concurrency=concurrency))


def check_visible(url: str, now_us: int) -> None:
    """Refuse to go on if an event doesn't show in the very next read.

    Raises:
        SystemExit: If it doesn't.
    """
    customer = CUSTOMERS + 1
    with httpx.Client(base_url=url, timeout=30) as client:
        for number in range(1, 21):
            event = {"event_id": -number, "customer_id": customer, "quantity": 1, "amount": 1.0}
            event["purchased_at"] = format_instant(now_us - number)
            client.post("/events", json={"source": SOURCE, "events": event}).raise_for_status()
            features = client.get(f"/features/{VIEW}/{customer}").json()["features"]
            if number not in features.values():
                raise SystemExit(f"after {number} events the features are {features}")


# ── Bulk ────────────────────────────────────────────────────────────────────────────


def bulk_file(path: Path, count: int, now_us: int) -> None:
    """Purchases of a year, in no order, as one Parquet file."""
    rng = np.random.default_rng(1)
    with pq.ParquetWriter(path, _purchases(rng, 0, 1, now_us).schema) as writer:
        for first in range(0, count, 1_000_000):
            writer.write_table(_purchases(rng, first, min(1_000_000, count - first), now_us))


def _purchases(rng: np.random.Generator, first: int, count: int, now_us: int) -> pa.Table:
    return pa.table(
        {
            "event_id": np.arange(first, first + count) + 10**9,
            "customer_id": rng.integers(1, CUSTOMERS + 1, count),
            "purchased_at": pa.array(now_us - rng.integers(1, 365 * US_PER_DAY, count), TIMESTAMP),
            "quantity": rng.integers(1, 9, count),
            "amount": np.round(rng.gamma(2.0, 15.0, count), 2),
        }
    )


def in_bulk(settings: Settings, file: Path, plan: Plan) -> tuple[list[list[object]], list[str]]:
    """The job on one file, its repetition, and how long each step of it takes alone."""
    rows: list[list[object]] = []
    peak_bytes = 0
    for turn in range(plan.rounds):
        home = settings.home / f"bulk{turn}"
        home.mkdir()
        fresh = settings.model_copy(update={"home": home, "project": f"bulk{turn}"})
        for what in ("new", "known already") if turn == 0 else ("new",):
            report, job_bytes = _job(fresh, file)
            peak_bytes = max(peak_bytes, job_bytes)
            expected = ("accepted" if what == "new" else "duplicates", plan.bulk_events)
            if report[expected[0]] != expected[1]:
                raise SystemExit(f"bulk ingestion said {report}")
            rows.append(
                [f"Parquet -> log, {what}", plan.bulk_events, 1, plan.bulk_events / report["seconds"], "", ""]
            )
        if turn + 1 < plan.rounds:
            shutil.rmtree(home)
    new = [row for row in rows if "new" in str(row[0])]
    speeds = [float(str(row[3])) for row in new]
    new[0][3] = statistics.median(speeds)
    told = ", ".join(f"{each:,.0f}" for each in speeds)
    notes = [f"Parquet -> log: runs of {told} events/s; peak memory of the job {peak_bytes / 2**30:.2f} GiB."]
    return [_told(row) for row in (new[0], *(row for row in rows if "known" in str(row[0])))], notes


def _job(settings: Settings, file: Path) -> tuple[dict[str, Any], int]:
    """What the job reports, and the memory that it needed at most, bytes."""
    command = [sys.executable, "jobs/ingest_events.py", "--source", SOURCE, "--json", str(file)]
    environment = {**os.environ, **settings.environment()}
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    with PeakMemory.of(job.pid) as peak:
        output, _ = job.communicate()
    if job.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {job.returncode}")
    report: dict[str, Any] = json.loads(output)
    return report, peak.peak_bytes


def steps(workspace: Workspace, file: Path, events: int) -> str:
    """What the steps of bulk ingestion take, each with those before it, in one process."""
    source, settings = workspace.definitions.source(SOURCE), workspace.settings.ingestion
    check = EventCheck(source, future_tolerance_us=settings.future_tolerance_us)
    now_us = workspace.clock.now_us()
    took: dict[str, float] = {}

    begin = time.perf_counter()
    for _ in read_batches(file, check, batch_rows=settings.batch_rows):
        pass
    took["reading Parquet"] = time.perf_counter() - begin
    begin = time.perf_counter()
    with workspace.event_log.bulk(source, ingested_us=now_us) as bulk:
        for batch in read_ahead(read_batches(file, check, batch_rows=settings.batch_rows)):
            bulk.add(check.check(batch.rows, now_us=now_us).accepted)
        took["reading ahead, checking, hashing, bucketing"] = time.perf_counter() - begin
        begin = time.perf_counter()
        bulk.commit()
    took["de-duplicating, sorting, writing Parquet, committing"] = time.perf_counter() - begin
    slowest = max(took, key=lambda each: took[each])
    told = "; ".join(f"{name} {seconds:.2f} s" for name, seconds in took.items())
    return f"Steps of one bulk run: {told}. The limit is {slowest}: {events / took[slowest]:,.0f} events/s."


# ── Together ────────────────────────────────────────────────────────────────────────


def _told(row: list[object]) -> list[object]:
    print(f"{row[0]}, {row[1]:,} a batch, concurrency {row[2]}: {row[3]:,.0f} events/s", flush=True)
    return row


def measure(settings: Settings, plan: Plan) -> Report:
    """All of it."""
    notes: list[str] = []
    with Workspace.open(settings) as workspace:
        now_us = workspace.clock.now_us()
        events = Events(now_us)
        rows = list(without_http(workspace, events, plan))
        with graph(workspace) as url:
            check_visible(url, now_us)
            rows = [*over_http(url, events, plan, settings.home), *rows]
        streams = workspace.streams
        waiting = sum(streams.lengths(streams.event_streams(SOURCE)).values())
        notes.append(f"After all that, {waiting:,} events waited in the streams, each once.")
        file = settings.home / "bulk.parquet"
        bulk_file(file, plan.bulk_events, now_us)
        found, said = in_bulk(workspace.settings, file, plan)
        notes += [*said, steps(workspace, file, plan.bulk_events)]
    return Report(
        title="Ingestion: events a second, live and in bulk",
        columns=["what", "events a batch", "concurrency", "events/s", "p50 ms", "p99 ms"],
        rows=[*rows, *found],
        notes=(
            "POST /events: one gateway replica on Ray Serve behind HAProxy; the load generator has the same cores.",
            "Each event is in the rings of two views and in a durable stream before the answer leaves.",
            "It shows in the very next read: looked at 20 times before anything was timed.",
            f"Live figures: medians of {plan.rounds} runs of {plan.seconds:g} s each; p50 and p99 are a request's.",
            "Parquet -> log: jobs/ingest_events.py, by its own clock: without the start of Python.",
            *notes,
        ),
        facts=facts("ray", "redis", "deltalake", "pyarrow", customers=CUSTOMERS, bulk_events=plan.bulk_events),
    )


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="as small as it gets, nothing written")
    parser.add_argument("--bulk-events", type=int, default=Plan.bulk_events, help="rows of the bulk file")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of a run")
    given = parser.parse_args()
    plan = SMOKE if given.smoke else Plan(seconds=given.seconds, bulk_events=given.bulk_events)
    with project() as settings:
        found = measure(settings, plan)
    print(found.markdown())
    if not given.smoke:
        print(f"written to {found.write('ingestion').relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
