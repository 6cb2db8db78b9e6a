"""The whole inference graph against what a user would first write, side by side.

    python benchmarks/serving.py            # two minutes; writes benchmarks/results/serving.{md,json}
    python benchmarks/serving.py --smoke    # seconds: does it run, do both say the same
    python benchmarks/serving.py --parts    # where a request's processor time goes; writes its own result
    python benchmarks/serving.py --entities 1 --concurrency 16 --skip distributed   # a part; nothing is written

Heliostat: the fused graph on Ray Serve behind HAProxy: rings merged at the request's instant,
A/B assignment, LightGBM, every prediction durable in the log before its answer. Peer:
`benchmarks/plain_server.py`, FastAPI and LightGBM on ready-made vectors, one HMGET an entity: one after
the other, as a user would first write it; and, as a second peer, all of a request's in one pipeline.
Same machine, same Valkey server, same model, same load generator; they take turns. A split of two versions
is running. Beside them a bare FastAPI route on the same Serve that returns a constant; then the distributed
placement of the same graph and the fused one, in turns of their own; and first what the load generator itself can
send at most.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import load, request_parts
from benchmarks.peers import ROOT, Report, facts, python_of
from benchmarks.programs import http_program
from benchmarks.served import (
    DISTRIBUTED,
    EVENTS_A_CUSTOMER,
    PEER_PREFIX,
    TREES,
    distributed,
    graph,
    prepare,
    project,
)
from heliostat.workspace import Workspace

PEER_PACKAGES = ("fastapi", "uvicorn", "uvloop", "httptools", "redis", "hiredis", "lightgbm", "numpy")


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        customers: With events.
        entities: A request, one cell each.
        concurrency: Connections, one cell each.
        seconds: A run.
        rounds: Runs of each contender in each cell.
        skip: Contenders that are left out.
    """

    customers: int = 2_000
    entities: tuple[int, ...] = (1, 100)
    concurrency: tuple[int, ...] = (1, 16, 64)
    seconds: float = 1.0
    rounds: int = 9
    skip: frozenset[str] = frozenset()


PARTS = ("plain", "pipelined", "bare", "distributed", "ceiling")
SMOKE = Plan(customers=50, entities=(1, 5), concurrency=(1, 4), seconds=0.3, rounds=1)

# Of the peer's requests/s, by peer, entities and concurrency.
GOALS: Mapping[tuple[str, int, int], float] = {
    ("plain", 1, 16): 1.0,
    ("plain", 1, 64): 1.3,
    ("plain", 100, 1): 6.0,
    ("plain", 100, 16): 6.0,
    ("plain", 100, 64): 12.0,
    ("bare", 1, 16): 0.75,
    ("bare", 100, 16): 0.75,
}
DISTRIBUTED_GOAL, DISTRIBUTED_AT = 0.5, 64
"""Of the fused placement's requests/s, at this concurrency."""


@dataclass
class Cell:
    """One contender in one cell, a figure a run."""

    requests_per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    failed: int = 0

    def add(self, found: dict[str, float]) -> None:
        """Add a run of `benchmarks/load.py`."""
        self.requests_per_s.append(found["requests_per_s"])
        self.p50_ms.append(found["p50_ms"])
        self.p99_ms.append(found["p99_ms"])
        self.failed += int(found["failed"])


def ratio(ours: Cell, theirs: Cell, what: str = "requests_per_s") -> float:
    """What is ours over theirs: the median over the turns, since a machine is quicker in one than in another."""
    return statistics.median(
        left / right for left, right in zip(getattr(ours, what), getattr(theirs, what), strict=True)
    )


# ── The contenders ──────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def peer(workspace: Workspace, python: Path, *more: str) -> Iterator[str]:
    """The plain server while the block runs, with more options; gives its address."""
    home = workspace.settings.home
    options = ["--redis", str(workspace.settings.online.url), "--prefix", PEER_PREFIX]
    files = ["--model", str(home / "model.txt"), "--features", str(home / "features.json")]
    with http_program(str(python), str(ROOT / "benchmarks" / "plain_server.py"), *options, *files, *more) as url:
        yield url


def ceiling(plan: Plan) -> dict[tuple[int, int], float]:
    """What the load generator sends at most, requests/s, by entities and concurrency."""
    with http_program(sys.executable, str(ROOT / "benchmarks" / "constant_server.py")) as url:
        return {
            (entities, concurrency): load.run(
                f"{url}/predict",
                seconds=min(plan.seconds, 1.0),
                entities=entities,
                population=plan.customers,
                concurrency=concurrency,
                seed=0,
            )["requests_per_s"]
            for entities in plan.entities
            for concurrency in plan.concurrency
        }


def check_agreement(ours: str, plain: str, customers: int) -> None:
    """Refuse to compare servers that say different things of those whom the same version serves.

    Raises:
        SystemExit: If they do, or if nobody is served by the other version.
    """
    asked = {"entity_ids": list(range(1, min(customers, 500) + 1))}
    answers = [httpx.post(f"{url}/predict", json=asked, timeout=30).json() for url in (ours, plain)]
    left, right = (np.array(each["predictions"]) for each in answers)
    same = np.array([each["variant"] == "control" for each in answers[0]["entities"]])
    if same.all() or not same.any():
        raise SystemExit("no split is running")
    if not np.array_equal(left[same], right[same]):
        raise SystemExit(f"the servers disagree by up to {np.abs(left - right)[same].max():.3g}")


Cells = dict[tuple[int, int], dict[str, Cell]]


def measure(contenders: Mapping[str, str], plan: Plan) -> Cells:
    """All cells; in each the contenders take turns.

    Args:
        contenders: Address by name.
        plan: How much.
    """
    cells: Cells = {}
    for entities in plan.entities:
        for concurrency in plan.concurrency:
            cell = cells[entities, concurrency] = {name: Cell() for name in contenders}
            for turn in range(-1, plan.rounds):  # the first turn warms up
                for name, url in contenders.items():
                    seconds = plan.seconds if turn >= 0 else min(plan.seconds, 0.5)
                    found = load.run(
                        f"{url}/predict",
                        seconds=seconds,
                        entities=entities,
                        population=plan.customers,
                        concurrency=concurrency,
                        seed=turn,
                    )
                    if turn >= 0:
                        cell[name].add(found)
            told = ", ".join(f"{name} {statistics.median(each.requests_per_s):,.0f}/s" for name, each in cell.items())
            print(f"{entities} entities, concurrency {concurrency}: {told}", flush=True)
    return cells


def goals(cells: Cells) -> Iterator[str]:
    """What was wanted, and whether it was reached, a line each."""
    for (entities, concurrency), cell in cells.items():
        ours = cell["heliostat"]
        wanted = {name: GOALS[name, entities, concurrency] for name in cell if (name, entities, concurrency) in GOALS}
        pairs = [(ratio(ours, cell[name]), goal, f"of {name}'s requests/s") for name, goal in wanted.items()]
        if DISTRIBUTED in cell and concurrency == DISTRIBUTED_AT:
            share = ratio(cell[DISTRIBUTED], cell["fused"])
            pairs.append((share, DISTRIBUTED_GOAL, "of the fused placement's requests/s, distributed"))
        for found, goal, what in pairs:
            reached = "reached" if found >= goal else "NOT reached"
            yield f"{entities} entities at {concurrency}: {found:.2f} {what}, goal {goal:g}: {reached}."
        if "plain" in cell and concurrency > 1:
            left, right = (statistics.median(cell[name].p99_ms) for name in ("heliostat", "plain"))
            reached = "reached" if left < right else "NOT reached"
            yield f"{entities} entities at {concurrency}: p99 {left:.1f} ms, below plain's {right:.1f}: {reached}."


def report(cells: Cells, most: Mapping[tuple[int, int], float], plan: Plan) -> Report:
    """The table: medians, of figures and of ratios; others than plain in the notes."""
    rows: list[list[object]] = []
    notes: list[str] = []
    for (entities, concurrency), cell in cells.items():
        row: list[object] = [entities, concurrency]
        for name in ("requests_per_s", "p50_ms", "p99_ms"):
            ours, plain = cell["heliostat"], cell.get("plain")
            row.append(statistics.median(getattr(ours, name)))
            row.append(float("nan") if plain is None else statistics.median(getattr(plain, name)))
            row.append(float("nan") if plain is None else ratio(ours, plain, name))
        rows.append(row)
        told = [
            f"{name} {statistics.median(cell[name].requests_per_s):,.0f} requests/s,"
            f" p99 {statistics.median(cell[name].p99_ms):.1f} ms"
            for name in ("pipelined", "bare", "distributed")
            if name in cell
        ]
        if "pipelined" in cell:
            share = ratio(cell["heliostat"], cell["pipelined"])
            told[0] = f"{share:.2f} of pipelined's {told[0].removeprefix('pipelined ')}"
        if DISTRIBUTED in cell:
            share = ratio(cell[DISTRIBUTED], cell["fused"])
            told[-1] += f", {share:.2f} of the fused placement's requests/s in turns with it"
        if (entities, concurrency) in most:
            told.append(f"the load generator against a constant {most[entities, concurrency]:,.0f} requests/s")
        if told:
            notes.append(f"{entities} entities at {concurrency}: {'; '.join(told)}.")
    names = dict.fromkeys(name for cell in cells.values() for name in cell)
    failed = {name: sum(cell[name].failed for cell in cells.values()) for name in names}
    told_failed = ", ".join(f"{'Heliostat' if name == 'heliostat' else name} {n}" for name, n in failed.items())
    columns = ["entities", "concurrency"]
    columns += [f"{what} {who}" for what in ("req/s", "p50 ms", "p99 ms") for who in ("Heliostat", "plain", "ratio")]
    return Report(
        title="Serving: the whole fused graph against a plain FastAPI program",
        columns=columns,
        rows=rows,
        notes=(
            "ratio: Heliostat over plain, the median of the turns; more is better for req/s, less for latencies.",
            f"Medians of {plan.rounds} turns of {plan.seconds:g} s each, in one run.",
            "Heliostat merges rings at the request's instant, so that an event shows in the next request.",
            (
                "It assigns variants, a split of two versions at 0.5 is running, and every prediction is in a durable"
                " log before its answer leaves."
            ),
            (
                "Plain reads ready-made vectors, one HMGET an entity, one after the other, and does nothing else."
                " Pipelined is the same program with a request's HMGETs in one pipeline."
            ),
            "Plain is one uvicorn process with uvloop and httptools; Heliostat one replica behind HAProxy.",
            (
                f"Requests that are answered together ask for some of the {plan.customers:,} customers twice;"
                " Heliostat looks those up and scores them once."
            ),
            (
                "Bare is a FastAPI route that returns a constant, on the same Serve. Distributed took turns with the"
                " fused placement alone, after the others had been measured; its share is the median of those turns."
            ),
            (
                "Both gave the same predictions, bit by bit, of those whom the same version serves, before anything"
                " was timed."
            ),
            f"Failed requests: {told_failed}.",
            *notes,
            *goals(cells),
        ),
        facts=facts(
            "ray", "fastapi", "redis", "lightgbm", customers=plan.customers, trees=TREES, events=EVENTS_A_CUSTOMER
        ),
    )


def run(workspace: Workspace, plan: Plan, python: Path | None) -> Report:
    """All of it.

    Args:
        workspace: Empty.
        plan: How much.
        python: Of the plain server's environment; None: it is left out.
    """
    most = {} if "ceiling" in plan.skip else ceiling(plan)
    prepare(workspace, plan.customers)
    with contextlib.ExitStack() as stack:
        contenders = {"heliostat": stack.enter_context(graph(workspace))}
        from benchmarks import bare_route  # Ray reads its environment when it is imported

        if python is not None:
            contenders["plain"] = stack.enter_context(peer(workspace, python))
            check_agreement(contenders["heliostat"], contenders["plain"], plan.customers)
            if "pipelined" not in plan.skip:
                contenders["pipelined"] = stack.enter_context(peer(workspace, python, "--pipelined"))
                check_agreement(contenders["heliostat"], contenders["pipelined"], plan.customers)
        if "bare" not in plan.skip:
            contenders["bare"] = bare_route.deploy(contenders["heliostat"], workspace.settings)
            stack.callback(bare_route.serve.delete, "bare")
        cells = measure(contenders, plan)
        if DISTRIBUTED not in plan.skip:
            fused = contenders["heliostat"]
            placements = {"fused": fused, DISTRIBUTED: stack.enter_context(distributed(workspace, fused))}
            for place, cell in measure(placements, plan).items():
                cells[place] |= cell
    return report(cells, most, plan)


def run_parts(workspace: Workspace, plan: Plan) -> Report:
    """Where the time of a request goes: one alone, and 16 at once; the workspace is empty."""
    prepare(workspace, plan.customers)
    valkey = int(workspace.online.client.info("server")["process_id"])
    seconds = max(3.0, plan.seconds)
    with graph(workspace) as url:
        cells = {
            (entities, concurrency): request_parts.measure(
                url,
                valkey,
                workspace.settings.home,
                entities=entities,
                customers=plan.customers,
                concurrency=concurrency,
                seconds=seconds,
            )
            for entities in plan.entities
            for concurrency in plan.concurrency[:2]
        }
    return request_parts.report(cells, seconds=seconds, customers=plan.customers)


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="as small as it gets, in this Python, nothing written")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of a run")
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="runs of each contender in each cell")
    parser.add_argument("--entities", type=int, nargs="+", default=Plan.entities, help="a request, one cell each")
    parser.add_argument("--concurrency", type=int, nargs="+", default=Plan.concurrency, help="connections, likewise")
    parser.add_argument("--skip", nargs="+", default=(), choices=PARTS, help="what isn't measured")
    parser.add_argument("--parts", action="store_true", help="where a request's time goes, and nothing else")
    given = parser.parse_args()
    plan = Plan(
        seconds=given.seconds,
        rounds=given.rounds,
        entities=tuple(given.entities),
        concurrency=tuple(given.concurrency),
        skip=frozenset(given.skip),
    )
    if given.smoke:
        plan = replace(SMOKE, skip=plan.skip)
    whole = not given.smoke and (plan.entities, plan.concurrency, plan.skip) == (
        Plan.entities,
        Plan.concurrency,
        Plan.skip,
    )
    same = [f"{name}=={importlib.metadata.version(name)}" for name in PEER_PACKAGES]
    python: Path | None = None
    if "plain" not in plan.skip and not given.parts:
        python = Path(sys.executable) if given.smoke else python_of("plain-server", same)
    with project() as settings, Workspace.open(settings) as workspace:
        found = run_parts(workspace, plan) if given.parts else run(workspace, plan, python)
    print(found.markdown())
    if whole:
        name = "serving_parts" if given.parts else "serving"
        print(f"written to {found.write(name).relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
