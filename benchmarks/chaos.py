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
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lightgbm
import numpy as np
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import chaos_declarations, serving
from benchmarks.peers import Report, facts
from deployments import graph
from deployments.stages import feature_readers, version_facts
from heliostat import cluster
from heliostat.clock import US_PER_DAY, format_instant
from heliostat.experiments.assignment import RoutingDocument
from heliostat.ingestion.intake import Intake
from heliostat.ingestion.sink import Sink
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.models.profile import Profile
from heliostat.serving.fallback import Rung
from heliostat.serving.spare_features import SpareFeatures
from heliostat.serving.stages import FeatureQuery
from heliostat.settings import Settings
from heliostat.storage.embedded import EmbeddedServer
from heliostat.workspace import Workspace

MODEL = "churn"
GOOD, BETTER, RAISES, HANGS, CORRUPT, OTHER = 1, 2, 3, 4, 5, 6
"""Versions; the last one is good, so that the newest is."""
CUSTOMERS = 500
A_REQUEST = 2
SHARE = 0.6
_CONNECTIONS = 64
_FEATURE_RUNGS = tuple(rung for rung in Rung if rung.of_features)


# ── What is right ───────────────────────────────────────────────────────────────────


def register(workspace: Workspace, matrix: np.ndarray, seed: int, wrong: str | None = None) -> int:
    """A version, trained on some rows; what is wrong with it is for `chaos_declarations`."""
    spec = workspace.definitions.model(MODEL)
    names = list(spec.feature_names)
    labels = (np.random.default_rng(seed).random(len(matrix)) < 1 / (1 + np.nan_to_num(matrix[:, 0]))).astype(float)
    parameters = {"objective": "binary", "num_leaves": 15, "min_data_in_leaf": 5, "verbosity": -1, "seed": seed}
    data = lightgbm.Dataset(matrix, labels, feature_name=names, params={"verbosity": -1})
    booster = lightgbm.train(parameters, data, num_boost_round=30 + seed)
    text = booster.model_to_string()
    if wrong is not None:
        text = text.replace("parameters:\n", f"parameters:\n{chaos_declarations.MARK.format(wrong)}\n", 1)
    profile = Profile.of(matrix, spec.feature_names, np.asarray(booster.predict(matrix)))
    package = ModelPackage(text, Signature.of(spec), spec.objective, profile=profile.to_document())
    return workspace.models.register(spec, package, lineage={}).version


@dataclass
class Truth:
    """What each version says of each customer; computed here, not asked of any replica.

    Attributes:
        scores: By version, row ``customer - 1``: with the features that are stored.
        spare: By version: with training medians.
        blank: By version: with nulls.
        prior: By version.
    """

    scores: dict[int, list[float]] = field(default_factory=dict)
    spare: dict[int, float] = field(default_factory=dict)
    blank: dict[int, float] = field(default_factory=dict)
    prior: dict[int, float | None] = field(default_factory=dict)

    def says(self, version: int, customer: int, fallback: str | None, features_from: str | None) -> float | None:
        """The right score of an answer that says where it comes from; None: there is none."""
        rung = fallback and Rung(fallback)
        if rung is Rung.PRIOR:
            return self.prior[version]
        if rung is Rung.BATCH:
            return None
        features = features_from or (fallback if rung in _FEATURE_RUNGS else None)
        if features == Rung.MEDIANS:
            return self.spare[version]
        if features == Rung.NULLS:
            return self.blank[version]
        return self.scores[version][customer - 1]


def prepare(workspace: Workspace) -> Truth:
    """Events of customers ``1 … n`` into the rings, versions good and bad, a route; and what is right."""
    rng = np.random.default_rng(7)
    now_us, count = workspace.clock.now_us(), CUSTOMERS * serving.EVENTS_A_CUSTOMER
    ages_us = (rng.exponential(60.0, count) * US_PER_DAY).astype(np.int64) + US_PER_DAY
    events = [
        {
            "event_id": number,
            "customer_id": 1 + number % CUSTOMERS,
            "purchased_at": format_instant(now_us - int(age_us)),
            "quantity": 1 + number % 5,
            "amount": 5.0 + number % 90,
        }
        for number, age_us in enumerate(ages_us)
    ]
    intake = Intake.of(workspace, workspace.online)
    for first in range(0, count, 1_000):
        intake.submit("purchases", events[first : first + 1_000])
    readers, spec = feature_readers(workspace), workspace.definitions.model(MODEL)
    entities = tuple(str(customer) for customer in range(1, CUSTOMERS + 1))
    stored, _ = readers.of(spec.feature_names).read(workspace.online, entities, as_of_us=now_us)
    wrongs = {RAISES: "raises", HANGS: "hangs"}
    found = [register(workspace, stored.matrix, version, wrongs.get(version)) for version in range(GOOD, OTHER + 1)]
    if found != list(range(GOOD, OTHER + 1)):
        raise SystemExit(f"versions {found}: the project isn't new")
    spares = SpareFeatures(readers, workspace.clock)
    query, truth = FeatureQuery(MODEL, spec.feature_names, entities[:1]), Truth()
    for version in found:
        told, model = version_facts(workspace)(MODEL, version), workspace.models.package(MODEL, version).load()
        block = spares.block(query)
        nulls = block.matrix(told.wanted)
        medians, _ = spares.completed(query, block, nulls, names=told.names, medians=told.medians, rows=None)
        truth.scores[version] = chaos_declarations.predict_rightly(model, stored.matrix).tolist()
        truth.spare[version], truth.blank[version] = (
            float(chaos_declarations.predict_rightly(model, matrix)[0]) for matrix in (medians, nulls)
        )
        truth.prior[version] = told.prior
    digest = workspace.models.get(MODEL, CORRUPT).artifact
    for file in workspace.settings.home.glob(f"**/{digest}/*.txt"):
        file.write_bytes(file.read_bytes().replace(b"leaf_value=", b"leaf_value=1", 1))
    workspace.promote(MODEL, GOOD, reason="the first one", force=True)
    return truth


# ── Load ────────────────────────────────────────────────────────────────────────────


@dataclass
class Act:
    """What was seen while one thing went wrong.

    Attributes:
        name: What went wrong.
        requests: That were answered, in whatever way.
        latencies_ms: One an answer, from when it was the request's turn.
        statuses: How many answers had a status other than 200; ``broken``: none came.
        fallbacks: How many predictions each rung gave.
        unlogged: Answers that said so.
        wrong: Answers that aren't right, and why; the first few.
        in_flight: When a process was killed: how many requests waited for an answer then.
        mended_at: When what was broken was whole again, or (a replica) was broken.
        last_bad_at: When the last answer came that wasn't the normal way's.
        notes: What the act itself has to say.
    """

    name: str
    requests: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    unlogged: int = 0
    wrong: list[str] = field(default_factory=list)
    in_flight: int = 0
    mended_at: float | None = None
    last_bad_at: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Requests without an answer of status 200."""
        return sum(self.statuses.values())

    @property
    def recovery_s(self) -> float | None:
        """Seconds from when all was whole again to the last answer that wasn't the normal way's."""
        return None if self.mended_at is None else max(0.0, self.last_bad_at - self.mended_at)

    def percentile(self, share: float) -> float:
        """Of the latencies, milliseconds."""
        ordered = sorted(self.latencies_ms) or [float("nan")]
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Load:
    """Clients that ask at a fixed rate, or as fast as they can, and look at every answer.

    Args:
        url: Of the service.
        truth: What is right.
        rate: Requests a second; None: each client asks again as soon as it has its answer.
        connections: Clients.
    """

    def __init__(self, url: str, truth: Truth, rate: float | None, *, connections: int = _CONNECTIONS) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        self._truth, self._rate, self._connections = truth, rate, connections
        rng = random.Random(5)
        self._asked = [[rng.randint(1, CUSTOMERS) for _ in range(A_REQUEST)] for _ in range(1_024)]
        head = "POST /predict HTTP/1.1\r\nHost: chaos\r\nContent-Type: application/json\r\nContent-Length: "
        bodies = [json.dumps({"entity_ids": each}) for each in self._asked]
        self._payloads = [f"{head}{len(body)}\r\n\r\n{body}".encode() for body in bodies]
        self.act = Act("before")
        self.revision = 0
        self.in_flight = 0
        self.answered: list[tuple[str, int, list[int], list[tuple[int, str, str | None]]]] = []
        """Request, the revision known when it was asked, customers, and version, variant, fallback of each."""

    async def run(self, done: asyncio.Event) -> None:
        """Ask until ``done``."""
        turns, begin = itertools.count(), asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._connections):
                group.create_task(self._client(turns, begin, done))

    async def _client(self, turns: Iterator[int], begin: float, done: asyncio.Event) -> None:
        loop, pipe = asyncio.get_running_loop(), None
        while not done.is_set():
            turn = next(turns)
            due = loop.time() if self._rate is None else begin + turn / self._rate
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            act, known, at = self.act, self.revision, turn % len(self._payloads)
            self.in_flight += 1
            try:
                if pipe is None:
                    pipe = await asyncio.open_connection(self._host, self._port)
                pipe[1].write(self._payloads[at])
                async with asyncio.timeout(15.0):
                    status, body, closes = await _answer(pipe[0])
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:  # TimeoutError is an OSError
                status, body, closes = "broken", type(error).__name__.encode(), True
            self.in_flight -= 1
            act.requests += 1
            act.latencies_ms.append((loop.time() - due) * 1e3)
            if status == "200":
                self._look(act, known, self._asked[at], orjson.loads(body))
            else:
                act.statuses[status] += 1
                act.last_bad_at = time.monotonic()
                if len(act.notes) < 3:
                    act.notes.append(f"{status}: {body[:160].decode(errors='replace')}")
            if closes and pipe is not None:
                pipe[1].close()
                pipe = None
        if pipe is not None:
            pipe[1].close()

    def _look(self, act: Act, known: int, asked: list[int], answer: dict[str, Any]) -> None:
        rows = answer["entities"]
        if answer["degraded"]:
            act.last_bad_at = time.monotonic()
            act.fallbacks.update(each["fallback"] for each in rows if each["fallback"])
        act.unlogged += not answer["logged"]
        if [each["entity_id"] for each in rows] != asked or answer["predictions"] != [e["prediction"] for e in rows]:
            self._wrong(act, f"asked for {asked}, answered {answer}")
        for customer, each in zip(asked, rows, strict=True):
            right = self._truth.says(each["model_version"], customer, each["fallback"], each.get("features_from"))
            if each["prediction"] != right:
                self._wrong(act, f"customer {customer}: {right} is right, answered {each}")
        told = [(each["model_version"], each["variant"], each["fallback"]) for each in rows]
        self.answered.append((answer["request_id"], known, asked, told))

    @staticmethod
    def _wrong(act: Act, what: str) -> None:
        if len(act.wrong) < 5:
            act.wrong.append(what)


async def _answer(reader: asyncio.StreamReader) -> tuple[str, bytes, bool]:
    """Status, body, and whether the connection is closed after it."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.partition("content-length:")[2].partition("\r\n")[0])
    return head.split(" ", 2)[1], await reader.readexactly(length), "connection: close" in head


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
        os.kill(one, signal.SIGKILL)
        act.in_flight, act.mended_at = self.load.in_flight, time.monotonic()
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


def verdict(acts: Iterable[Act], found: Audit, *, deadline_ms: float) -> list[str]:
    """What isn't as it has to be."""
    wrong = [f"{act.name}: {each}" for act in acts for each in act.wrong]
    wrong += [f"log: {each}" for each in found.mixed]
    if found.missing or found.twice:
        wrong.append(f"log: {found.missing} answered predictions are missing, {found.twice} rows are there twice")
    for act in acts:
        if act.failed > act.in_flight:
            wrong.append(f"{act.name}: {act.failed} requests failed, and {act.in_flight} were in flight: {act.notes}")
        # What the client and the ingress need comes on top of the service's own time.
        if act.percentile(0.999) > deadline_ms + 500:
            wrong.append(f"{act.name}: 1 in 1000 took {act.percentile(0.999):.0f} ms and longer")
    return wrong


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
        f"Load at {rate:.0f} requests/s of {A_REQUEST} entities: {SHARE:.0%} of {most:.0f}, what 16 clients reach.",
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
    with serving.project() as bare, Workspace.open(settings_of(bare)) as workspace, cluster.connect(bare):
        truth = prepare(workspace)
        url = graph.deploy(workspace.settings)
        try:
            most, before = asyncio.run(capacity(url, truth, seconds=min(5.0, given.seconds / 10)))
            load = Load(url, truth, SHARE * most)
            load.answered += before.answered
            load.revision = 1
            stage = Stage(workspace, load, seconds=given.seconds)
            with sink(workspace.settings):
                asyncio.run(play_all(stage, seconds=given.seconds))
        finally:
            graph.undeploy()
        found = audit(workspace, load)
    wrong = verdict(stage.acts, found, deadline_ms=workspace.settings.serving.deadline_ms)
    told = report(stage.acts, found, SHARE * most, most, wrong)
    print(told.markdown())
    if given.seconds >= 600:
        told.write("chaos")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
