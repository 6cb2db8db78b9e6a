"""Load while things go wrong, and every answer looked at: what the inference graph is worth when something fails.

    python benchmarks/chaos.py                 # ten minutes; writes benchmarks/results/chaos.{md,json}
    python benchmarks/chaos.py --seconds 60    # shorter; nothing is written

Two replicas of the fused graph on Ray Serve, behind its ingress, over real HTTP; a real Valkey server; a sink that
drains into Delta all the time. The load comes at a fixed rate, a share of what the same clients reach when they wait
for nothing: a slow answer doesn't slow the questions down, and its delay counts from when its turn was. Every
score is computed again, offline, from the version that its answer names; in the end every answer is looked up in the
prediction log, and its variant in the route whose revision the log says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import served
from benchmarks.chaos_load import (
    A_REQUEST,
    BETTER,
    CORRUPT,
    CUSTOMERS,
    GOOD,
    HANGS,
    MODEL,
    OTHER,
    RAISES,
    Act,
    Load,
    Truth,
    prepare,
)
from benchmarks.peers import Report, facts
from deployments import graph
from heliostat import cluster
from heliostat.clock import US_PER_DAY
from heliostat.experiments.assignment import RoutingDocument
from heliostat.ingestion.sink import Sink
from heliostat.settings import Settings
from heliostat.storage.embedded import EmbeddedServer
from heliostat.workspace import Workspace

SHARE = 0.6
"""Of the capacity: the load."""

_CAPACITY_S = 15.0
"""How long clients ask as fast as they can, after as long a warming up: a sink's work comes in waves."""

_SEEN_S = 0.2
"""How long an ingress may take to see that a process has gone."""


# ── What goes wrong ─────────────────────────────────────────────────────────────────


class Stage:
    """Where acts are played: a deployed graph under load.

    Args:
        workspace: The project.
        load: Asks it.
        seconds: How long an act takes.
    """

    def __init__(self, workspace: Workspace, load: Load, *, seconds: float) -> None:
        self.workspace, self.load, self.seconds = workspace, load, seconds
        self.acts: list[Act] = []

    async def play(self, name: str, what: Callable[[Act], Awaitable[None]]) -> Act:
        """Let something go wrong, and go on a while."""
        act = self.load.act = Act(name)
        self.acts.append(act)
        begin = time.monotonic()
        await asyncio.sleep(min(1.0, self.seconds / 8))  # what is under way still counts for the act before
        await what(act)
        await asyncio.sleep(max(0.0, begin + self.seconds - time.monotonic()))
        return act

    async def nothing(self, _: Act) -> None:
        """All is well."""

    async def change(self, how: Callable[[], object]) -> None:
        """Change the route; from now on no answer may be by an older one."""
        await asyncio.to_thread(how)
        found = await asyncio.to_thread(self.workspace.rollout.current, MODEL)
        self.load.revision = 0 if found is None else found.revision

    async def promotions(self, act: Act) -> None:
        """Twenty promotions, rollbacks, and splits that begin, widen and end."""
        space, pause_s = self.workspace, self.seconds / 25
        for turn in range(4):
            for how in (
                lambda: space.promote(MODEL, BETTER, reason="better", force=True),
                lambda: space.roll_back(MODEL, reason="it wasn't"),
                lambda turn=turn: space.rollout.start_split(
                    MODEL, experiment=f"e{turn}", control=GOOD, challenger=OTHER, weight=0.5, coverage=0.5
                ),
                lambda: space.rollout.widen(MODEL, 1.0),
                lambda: space.rollout.serve(MODEL, GOOD, reason="neither", end_split=True),
            ):
                await self.change(how)
                await asyncio.sleep(pause_s)
        act.mended_at = time.monotonic()

    async def replica_killed(self, act: Act) -> None:
        """One of the processes that answer, without a word."""
        one = (await asyncio.to_thread(replicas))[0]
        waiting, begun = self.load.in_flight, self.load.begun
        os.kill(one, signal.SIGKILL)
        act.mended_at = time.monotonic()
        # Its sockets take requests until the kernel has closed them and the ingress has seen that.
        while cluster._alive(one):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.005)
        await asyncio.sleep(_SEEN_S)
        act.in_flight = waiting + self.load.begun - begun
        while len(await asyncio.to_thread(replicas)) > 1 and time.monotonic() < act.mended_at + 10:  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.02)
        while len(await asyncio.to_thread(replicas)) < 2 and time.monotonic() < act.mended_at + 60:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)
        act.notes.append(f"{len(replicas())} replicas ran again after {time.monotonic() - act.mended_at:.1f} s")

    async def store_killed(self, act: Act) -> None:
        """Valkey, without a word; started again after a while."""
        home = self.workspace.settings.home
        record = json.loads((home / "valkey" / "server.json").read_text())
        os.kill(record["pid"], signal.SIGKILL)
        await asyncio.sleep(min(5.0, self.seconds / 4))
        server = await asyncio.to_thread(EmbeddedServer.ensure, home)
        act.mended_at = time.monotonic()
        server.close()

    async def bad_version(self, act: Act, version: int) -> None:
        """A version for a part, then for everybody, then no more."""
        space = self.workspace
        await self.change(
            lambda: space.rollout.start_split(
                MODEL, experiment=f"bad{version}", control=GOOD, challenger=version, weight=0.5, coverage=1.0
            )
        )
        await asyncio.sleep(self.seconds / 4)
        await self.change(lambda: space.rollout.serve(MODEL, version, reason="who knows", end_split=True))
        await asyncio.sleep(self.seconds / 4)
        await self.change(lambda: space.rollout.serve(MODEL, GOOD, reason="it is bad"))
        act.mended_at = time.monotonic()


def replicas() -> list[int]:
    """The processes that answer."""
    return [pid for pid in cluster._own_workers() if "ServeReplica" in cluster._read_proc(pid, "cmdline")]


# ── Afterwards ──────────────────────────────────────────────────────────────────────


@dataclass
class Audit:
    """What the prediction log says of all answers.

    Attributes:
        rows: In the log.
        answered: Predictions that were answered.
        missing: Of those, not in the log.
        twice: In the log more than once.
        others: In the log, and never answered: written before a client or a process was gone.
        mixed: Whose version or variant isn't the one of the route whose revision was logged, or the log says another
            than the answer, or the revision is older than the one that was known when they were asked; the first few.
    """

    rows: int = 0
    answered: int = 0
    missing: int = 0
    twice: int = 0
    others: int = 0
    mixed: list[str] = field(default_factory=list)


def audit(workspace: Workspace, load: Load) -> Audit:
    """Drain what is left, and compare the log with the answers."""
    Sink.of(workspace).drain_once()
    columns = ["prediction_id", "revision", "entity", "version", "variant", "fallback", "score"]
    end_us = workspace.clock.now_us() + US_PER_DAY
    table = workspace.offline_store.read_predictions(MODEL, start_us=0, end_us=end_us, columns=columns)
    names = table.column("prediction_id").to_pylist()
    at = {name: row for row, name in enumerate(names)}
    others = [table.column(name).to_pylist() for name in columns[1:]]
    routes = {row.revision: RoutingDocument.from_document(row.document) for row in workspace.rollout.history(MODEL)}
    found = Audit(rows=len(names), twice=len(names) - len(at))
    for request_id, known, asked, told in load.answered:
        for row, (customer, said) in enumerate(zip(asked, told, strict=True)):
            found.answered += 1
            place = at.pop(f"{request_id}-{row}", None)
            if place is None:
                found.missing += 1
                continue
            revision, entity, version, variant, fallback, _ = (column[place] for column in others)
            chosen = routes[revision].variant_of(str(customer)) or routes[revision].control
            outside = routes[revision].variant_of(str(customer)) is None
            right = (
                (version, variant, fallback) == said
                and entity == str(customer)
                and revision >= known
                and (fallback is not None or version == chosen.version)
                and (outside or variant == chosen.name)
            )
            if not right and len(found.mixed) < 5:
                found.mixed.append(f"{entity} by {said}, logged {(revision, version, variant, fallback)}, {known=}")
    found.others = len(at)
    return found


def verdict(acts: Iterable[Act], found: Audit) -> list[str]:
    """What isn't as it has to be, however fast the machine is."""
    wrong = [f"{act.name}: {each}" for act in acts for each in act.wrong]
    wrong += [f"log: {each}" for each in found.mixed]
    if found.missing or found.twice:
        wrong.append(f"log: {found.missing} answered predictions are missing, {found.twice} rows are there twice")
    for act in acts:
        if act.failed > act.in_flight:
            wrong.append(f"{act.name}: {act.failed} requests failed, and {act.in_flight} were in flight: {act.notes}")
    return wrong


def late(acts: Iterable[Act], *, deadline_ms: float) -> list[str]:
    """Acts whose slowest answers came later than the deadline, and what client and ingress need on top of it."""
    slowest = {act.name: act.percentile(0.999) for act in acts}
    return [
        f"{name}: 1 in 1000 took {took_ms:.0f} ms and longer"
        for name, took_ms in slowest.items()
        if took_ms > deadline_ms + 500
    ]


# ── All of it ───────────────────────────────────────────────────────────────────────


def settings_of(settings: Settings) -> Settings:
    """Two replicas, which answer while the log is away, and models that may be bad."""
    changed = {"port": 0, "replicas": 2, "when_log_fails": "answer", "log_buffer_rows": 100_000}
    return settings.model_copy(
        update={
            "definitions": "benchmarks.chaos_declarations",
            "serving": settings.serving.model_copy(update=changed),
        }
    )


@contextlib.contextmanager
def sink(settings: Settings) -> Iterator[None]:
    """A sink in a process of its own, while the block runs."""
    document = settings.home / "sink.json"
    document.write_text(settings.model_dump_json())
    process = subprocess.Popen([sys.executable, __file__, "--sink", str(document)])
    ready = document.with_suffix(".runs")
    try:
        while not ready.exists() and process.poll() is None:
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def drain_for_ever(document: Path) -> None:
    """The sink's process; SIGTERM ends it."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with Workspace.open(Settings.model_validate_json(document.read_text())) as workspace:
        Sink.of(workspace).drain_once()
        document.with_suffix(".runs").touch()
        Sink.of(workspace).run_forever(1.0, stop)


async def capacity(url: str, truth: Truth, *, seconds: float) -> tuple[float, Load]:
    """Requests a second that clients reach who ask again at once; and what they were answered."""
    load, done = Load(url, truth, None, connections=16), asyncio.Event()
    for _ in range(2):  # the first part warms up
        done.clear()
        load.act = Act("capacity")
        asyncio.get_running_loop().call_later(seconds, done.set)
        await load.run(done)
    return load.act.requests / seconds, load


async def play_all(stage: Stage, *, seconds: float) -> None:
    """All acts, one after the other, for so many seconds."""
    done = asyncio.Event()
    loading = asyncio.create_task(stage.load.run(done))
    parts: list[tuple[str, float, Callable[[Act], Awaitable[None]]]] = [
        ("all is well", 1, stage.nothing),
        ("20 promotions, rollbacks, splits", 2, stage.promotions),
        ("a replica killed", 1.5, stage.replica_killed),
        ("Valkey killed, started again", 1.5, stage.store_killed),
        ("a version that raises", 1, lambda act: stage.bad_version(act, RAISES)),
        ("a version that hangs", 1.5, lambda act: stage.bad_version(act, HANGS)),
        ("a corrupt artifact", 1, lambda act: stage.bad_version(act, CORRUPT)),
        ("all is well again", 0.5, stage.nothing),
    ]
    whole = sum(weight for _, weight, _ in parts)
    try:
        for name, weight, what in parts:
            stage.seconds = seconds * weight / whole
            act = await stage.play(name, what)
            print(
                f"{name}: {act.requests} requests, {act.failed} failed, p99 {act.percentile(0.99):.0f} ms", flush=True
            )
    finally:
        done.set()
        await loading


def report(acts: list[Act], found: Audit, rate: float, most: float, wrong: list[str]) -> Report:
    """The table."""
    columns = (
        "act",
        "requests",
        "not 2xx",
        "in flight",
        "p50 ms",
        "p99 ms",
        "max ms",
        "fallbacks",
        "recovery s",
        "wrong",
    )
    rows = [
        (
            act.name,
            act.requests,
            act.failed,
            act.in_flight or "",
            act.percentile(0.5),
            act.percentile(0.99),
            act.percentile(1.0),
            ", ".join(f"{number} {rung}" for rung, number in act.fallbacks.most_common()) or "none",
            "" if act.recovery_s is None else act.recovery_s,
            len(act.wrong),
        )
        for act in acts
    ]
    notes = [
        (
            f"Load at {rate:.0f} requests/s of {A_REQUEST} entities: {SHARE:.0%} of {most:.0f}, what 16 clients "
            "reach beside the sink."
        ),
        "Latency: from when it was a request's turn. Recovery: from when all was whole again; of a replica: its end.",
        (
            f"Log: {found.answered} predictions answered, {found.missing} of them missing, {found.twice} rows twice; "
            f"{found.others} rows more, whose answer never came."
        ),
        f"Answers that said they weren't logged yet: {sum(act.unlogged for act in acts)}; their rows followed.",
        *(f"{act.name}: {'; '.join(act.notes)}" for act in acts if act.notes),
        *(f"NOT AS IT HAS TO BE: {each[:300]}" for each in wrong),
    ]
    return Report(
        "Load while things go wrong", columns, rows, notes, facts("ray", "lightgbm", "redis", customers=CUSTOMERS)
    )


def main() -> int:
    """Run as a program; exit code 1 if something isn't as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="of load; only 600 and more are written down")
    parser.add_argument("--sink", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.sink is not None:
        drain_for_ever(given.sink)
        return 0
    gc.disable()  # looking through all answers that are kept would stop the clients for half a second, and seem ours
    with served.project() as bare, Workspace.open(settings_of(bare)) as workspace, cluster.connect(bare):
        truth = prepare(workspace)
        url = graph.deploy(workspace.settings)
        try:
            with sink(workspace.settings):
                most, before = asyncio.run(capacity(url, truth, seconds=min(_CAPACITY_S, given.seconds / 10)))
                load = Load(url, truth, SHARE * most)
                load.answered += before.answered
                load.revision = 1
                stage = Stage(workspace, load, seconds=given.seconds)
                asyncio.run(play_all(stage, seconds=given.seconds))
        finally:
            graph.undeploy()
        found = audit(workspace, load)
    wrong = verdict(stage.acts, found) + late(stage.acts, deadline_ms=workspace.settings.serving.deadline_ms)
    told = report(stage.acts, found, SHARE * most, most, wrong)
    print(told.markdown())
    if given.seconds >= 600:
        told.write("chaos")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
