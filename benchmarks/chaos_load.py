"""What is right, and clients that look at every answer: for benchmarks/chaos.py."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import lightgbm
import numpy as np
import orjson

from benchmarks import chaos_declarations, served
from deployments.stages import feature_readers, version_facts
from heliostat.clock import US_PER_DAY, format_instant
from heliostat.ingestion.intake import Intake
from heliostat.models.packaging import ModelPackage, Signature
from heliostat.models.profile import Profile
from heliostat.serving.fallback import Rung
from heliostat.serving.lookup import FeatureQuery
from heliostat.serving.spare_features import SpareFeatures
from heliostat.workspace import Workspace

MODEL = "churn"
GOOD, BETTER, RAISES, HANGS, CORRUPT, OTHER = 1, 2, 3, 4, 5, 6
"""Versions; the last one is good, so that the newest is."""
CUSTOMERS = 500
A_REQUEST = 2
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
    now_us, count = workspace.clock.now_us(), CUSTOMERS * served.EVENTS_A_CUSTOMER
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
        in_flight: When a process was killed: how many requests waited for an answer then, or came until it was gone.
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
        self.begun = 0
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
            self.begun += 1
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
