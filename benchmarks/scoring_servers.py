"""The same model, its features in the request: Heliostat beside BentoML's server and MLflow's.

    python benchmarks/scoring_servers.py          # eleven minutes; writes its file in benchmarks/results
    python benchmarks/scoring_servers.py --smoke  # without the peers, unless --peers: does it run
    python benchmarks/scoring_servers.py --rows 100 --concurrency 16  # a part; nothing is written

A model server is asked for scores of feature vectors; it knows no entities, stores and logs nothing. Heliostat knows
features itself, and takes them from a request as well, of `POST /predict` or of the Open Inference Protocol: with an
entity in each row, since variants are assigned and predictions logged by entity. So here it does all that besides:
goes by the routing document, assigns, and logs, durable before the answer, or (a second deployment) soon after it.

Same machine, same model, same rows, same load generator; the contenders take turns. Beside requests/s the table has
the processor time of a request in all processes of its server: that is what it costs, however busy the machine is.

A lone client gets some 300 answers a second, of which the third latest is the p99: who is behind is a matter of luck
then. Its turns are twice as long, and twice as many.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import load
from benchmarks.peers import ROOT, Report, facts, python_of
from benchmarks.processes import cpu_s, replica_pid, titled, tree
from benchmarks.served import MODEL, TREES, graph, prepare, project
from benchmarks.serving import Cell, ratio
from heliostat.ports import free_ports
from heliostat.workspace import Workspace

OURS, OURS_ASYNC, OURS_OPEN = "Heliostat", "Heliostat, log async", "Heliostat, Open Inference Protocol"
BENTOML, MLFLOW = "BentoML", "MLflow"
PEERS = (BENTOML, MLFLOW)

# What makes uvicorn quick in ours makes it quick in them too; and the same LightGBM.
_ALIKE = tuple(f"{name}=={importlib.metadata.version(name)}" for name in ("uvloop", "httptools", "lightgbm"))
REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    BENTOML: ("bentoml==1.4.39", *_ALIKE),
    MLFLOW: ("mlflow==3.17.2", *_ALIKE),
}
NOTES = (
    (
        "CPU ms: processor time of a request in all processes of its server, user and system; of Heliostat those are"
        " the replica, HAProxy and the online store's server."
    ),
    (
        "Heliostat: one replica behind HAProxy, `POST /predict` with `entity_ids` and all features of the model. A"
        " variant is assigned by the routing document, which holds when the prediction is logged: durable before the"
        " answer leaves, or with `serving.log: async`, where the document is read instead, soon after it."
    ),
    (
        "Open Inference Protocol: the same deployment as the first, `POST /v2/models/churn/infer` with a tensor a"
        " feature, in JSON; predictions alone are asked for."
    ),
    (
        f"BentoML ({', '.join(REQUIREMENTS[BENTOML])}): `bentoml serve`, 1 worker, a batchable method that takes a"
        " NumPy array; adaptive batching with max_batch_size 6,400 rows (at its default of 100, a lone client's"
        " requests of 100 rows took several times as long) and max_latency_ms 1,000; metrics on, access log off."
    ),
    (
        f"MLflow ({', '.join(REQUIREMENTS[MLFLOW])}): `mlflow models serve --env-manager local`, 1 worker, a model"
        " with a signature, rows as `inputs`, access log off."
    ),
    "Both peers got uvloop and httptools, which they don't ask for, and one thread for LightGBM, as in Heliostat.",
    "All gave the same scores, bit by bit, before anything was timed.",
)
_BODIES = 128
# How many times as many turns a lone client has, and how many times as long ones.
_LONE_TIMES = 2
_STARTS_WITHIN_S = 90.0

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        customers: With events and features.
        rows: A request, one cell each.
        concurrency: Connections, one cell each.
        seconds: A run, of several clients.
        rounds: Runs of each contender in each cell, likewise.
        peers: Those that take part.
    """

    customers: int = 2_000
    rows: tuple[int, ...] = (1, 100)
    concurrency: tuple[int, ...] = (1, 16, 64)
    seconds: float = 1.0
    rounds: int = 7
    peers: tuple[str, ...] = PEERS

    def turns(self, concurrency: int) -> tuple[int, float]:
        """How many runs each contender has of a cell, and how long they are, seconds."""
        times = _LONE_TIMES if concurrency == 1 else 1
        return times * self.rounds, times * self.seconds


SMOKE = Plan(customers=50, rows=(1, 5), concurrency=(1, 4), seconds=0.3, rounds=1, peers=())


@dataclass(frozen=True)
class Contender:
    """A server.

    Attributes:
        url: Of its route.
        body: A request's document, of entity ids and their rows.
        scores: Those of an answer's document.
        pids: All its processes.
    """

    url: str
    body: Callable[[list[int], Matrix], object]
    scores: Callable[[Any], list[float]]
    pids: tuple[int, ...]


@dataclass
class Costed(Cell):
    """One contender in one cell; with processor time, milliseconds a request."""

    cpu_ms: list[float] = field(default_factory=list)

    def add_run(self, found: dict[str, float], cpu: float) -> None:
        """Add a run, and the processor seconds that its server had meanwhile."""
        self.add(found)
        self.cpu_ms.append(1e3 * cpu / found["requests"])

    def median(self, name: str) -> float:
        """Of one of the figures."""
        return float(statistics.median(getattr(self, name)))


Cells = dict[tuple[int, int], dict[str, Costed]]


# ── Ours ────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def ours(workspace: Workspace, names: tuple[str, ...]) -> Iterator[dict[str, Contender]]:
    """Heliostat's contenders while the block runs.

    Args:
        workspace: With a model that serves alone.
        names: The columns of rows, qualified.
    """
    short = [name.partition("__")[2] for name in names]

    def predict(entities: list[int], rows: Matrix) -> object:
        given = [dict(zip(short, row, strict=True)) for row in rows.tolist()]
        return {"entity_ids": entities, "features": given}

    def infer(entities: list[int], rows: Matrix) -> object:
        tensors = [{"name": "entity_id", "datatype": "INT64", "shape": [len(entities)], "data": entities}]
        for name, column in zip(names, rows.T.tolist(), strict=True):
            tensors.append({"name": name, "datatype": "FP64", "shape": [len(column)], "data": column})
        return {"inputs": tensors, "outputs": [{"name": "prediction"}]}

    with graph(workspace) as url:
        from benchmarks import below_prefix  # Ray reads its environment when it is imported

        settings = workspace.settings
        serving = settings.serving.model_copy(update={"log": "async"})
        beside = below_prefix.deploy(url, settings.model_copy(update={"serving": serving}), "async")
        valkey = int(workspace.online.client.info("server")["process_id"])
        shared = (valkey, *titled(b"haproxy"))
        durable, soon = ((replica_pid(name), *shared) for name in ("heliostat", "async"))
        try:
            yield {
                OURS: Contender(f"{url}/predict", predict, lambda said: said["predictions"], durable),
                OURS_ASYNC: Contender(f"{beside}/predict", predict, lambda said: said["predictions"], soon),
                OURS_OPEN: Contender(
                    f"{url}/v2/models/{MODEL}/infer", infer, lambda said: said["outputs"][0]["data"], durable
                ),
            }
        finally:
            below_prefix.serve.delete("async")


# ── Peers ───────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def server(python: Path, *command: str, answers: str, **environment: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A peer's own server while the block runs: its address and its processes.

    Args:
        python: Of its environment.
        command: A program of that environment and its arguments, ``{port}`` among them.
        answers: The path that says when it is there.
        environment: Besides this process's own.

    Raises:
        SystemExit: If it doesn't come up.
    """
    port = str(free_ports("127.0.0.1", 1)[0])
    program, *arguments = (part.replace("{port}", port) for part in command)
    path = f"{python.parent}:{os.environ['PATH']}"
    # A request's rows are too few to share among threads; the other processor is the load generator's.
    variables = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [str(python.parent / program), *arguments], cwd=ROOT / "benchmarks", env=variables, stdout=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        limit = time.monotonic() + _STARTS_WITHIN_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}{answers}", timeout=2.0).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"{' '.join(command)} doesn't answer")
            time.sleep(0.1)
        yield url, tuple(tree(process.pid))
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextlib.contextmanager
def bentoml(python: Path, model: Path) -> Iterator[Contender]:
    """BentoML's server."""
    home = {"BENTOML_HOME": str(model.parent / "bentoml"), "BENTOML_DO_NOT_TRACK": "True", "MODEL": str(model)}
    command = ("bentoml", "serve", "bento_service:Scorer", "--host", "127.0.0.1", "--port", "{port}")
    with server(python, *command, answers="/readyz", **home) as (url, pids):
        yield Contender(f"{url}/predict", lambda _, rows: {"rows": rows.tolist()}, lambda said: said, pids)


@contextlib.contextmanager
def mlflow(python: Path, model: Path) -> Iterator[Contender]:
    """MLflow's server."""
    folder = model.parent / "mlflow"
    subprocess.run([str(python), str(ROOT / "benchmarks" / "mlflow_model.py"), str(model), str(folder)], check=True)
    command = ("mlflow", "models", "serve", "--model-uri", str(folder), "--host", "127.0.0.1", "--port", "{port}")
    alone = ("--env-manager", "local", "--workers", "1")
    with server(python, *command, *alone, answers="/ping", UVICORN_ACCESS_LOG="0") as (url, pids):
        yield Contender(
            f"{url}/invocations", lambda _, rows: {"inputs": rows.tolist()}, lambda said: said["predictions"], pids
        )


# ── Turns ───────────────────────────────────────────────────────────────────────────


def check_agreement(contenders: Mapping[str, Contender], matrix: Matrix) -> None:
    """Refuse to compare servers that say different things.

    Raises:
        SystemExit: If they do.
    """
    rows = matrix[:100]
    entities = list(range(1, len(rows) + 1))
    said: dict[str, Matrix] = {}
    for name, each in contenders.items():
        answer = httpx.post(each.url, json=each.body(entities, rows), timeout=30)
        if answer.status_code != 200:
            raise SystemExit(f"{name} answers {answer.status_code}: {answer.text[:500]}")
        said[name] = np.array(each.scores(answer.json()))
        if not np.array_equal(said[name], said[OURS]):
            raise SystemExit(f"{name} disagrees by up to {np.abs(said[name] - said[OURS]).max():.3g}")


def write_bodies(contender: Contender, matrix: Matrix, rows: int, file: Path) -> None:
    """Requests for random rows, the same for each contender, a line each."""
    rng = np.random.default_rng(rows)
    with file.open("w") as written:
        for _ in range(_BODIES):
            chosen = rng.integers(0, len(matrix), rows)
            written.write(json.dumps(contender.body((chosen + 1).tolist(), matrix[chosen])) + "\n")


def measure(contenders: Mapping[str, Contender], matrix: Matrix, plan: Plan, folder: Path) -> Cells:
    """All cells; in each the contenders take turns.

    Args:
        contenders: By name.
        matrix: Rows to draw from.
        plan: How much.
        folder: For requests.
    """
    cells: Cells = {}
    for rows in plan.rows:
        files = {name: folder / f"bodies-{at}-{rows}" for at, name in enumerate(contenders)}
        for name, file in files.items():
            write_bodies(contenders[name], matrix, rows, file)
        for concurrency in plan.concurrency:
            cell = cells[rows, concurrency] = {name: Costed() for name in contenders}
            turns, seconds = plan.turns(concurrency)
            for turn in range(-1, turns):  # the first turn warms up
                for name, contender in contenders.items():
                    before = cpu_s(contender.pids)
                    found = load.run(
                        contender.url,
                        seconds=seconds,
                        bodies=files[name],
                        again=1_000,
                        concurrency=concurrency,
                    )
                    if turn >= 0:
                        cell[name].add_run(found, cpu_s(contender.pids) - before)
            told = ", ".join(
                f"{name} {each.median('requests_per_s'):,.0f}/s {each.median('cpu_ms'):.2f} ms"
                for name, each in cell.items()
            )
            print(f"{rows} rows, concurrency {concurrency}: {told}", flush=True)
    return cells


# ── What was found ──────────────────────────────────────────────────────────────────


def behind(cells: Cells) -> Iterator[str]:
    """Where Heliostat isn't ahead of a peer, a line each."""
    for (rows, concurrency), cell in cells.items():
        for peer in (name for name in PEERS if name in cell):
            for name in (OURS, OURS_ASYNC, OURS_OPEN):
                left, right = cell[name], cell[peer]
                rate, late = (ratio(left, right, each) for each in ("requests_per_s", "p99_ms"))
                told = [f"{rate:.2f} of its requests/s"] if rate <= 1 else []
                told += [f"p99 {late:.2f} times its p99"] if late >= 1 else []
                if told:
                    yield f"{name}, {rows} rows at {concurrency}: behind {peer}: {', '.join(told)}."


def report(cells: Cells, plan: Plan) -> Report:
    """The table: medians."""
    peers = [name for name in PEERS if name in plan.peers]
    columns = ["rows", "concurrency", "server", "req/s", "p50 ms", "p99 ms", "CPU ms", "failed"]
    columns += [f"{what} over {peer}" for peer in peers for what in ("req/s", "p99")]
    table: list[list[object]] = []
    for (rows, concurrency), cell in cells.items():
        for name, each in cell.items():
            figures = [each.median(column) for column in ("requests_per_s", "p50_ms", "p99_ms", "cpu_ms")]
            ratios = [ratio(each, cell[peer], what) for peer in peers for what in ("requests_per_s", "p99_ms")]
            table.append([rows, concurrency, name, *figures, each.failed, *ratios])
    lines = list(behind(cells))
    return Report(
        title="Scoring servers: the same model, its features in the request",
        columns=columns,
        rows=table,
        notes=[
            (
                f"Medians of {plan.rounds} runs of {plan.seconds:g} s each, {_LONE_TIMES} times as many and as long"
                " with one client at once, whose few answers make a poor p99; the contenders took turns in one run. A"
                " ratio is the median over the turns."
            ),
            *NOTES,
            *(lines or (["Heliostat was ahead of each peer in requests/s and p99 everywhere."] if peers else [])),
        ],
        facts=facts("ray", "lightgbm", customers=plan.customers, trees=TREES),
    )


def run(workspace: Workspace, plan: Plan) -> Report:
    """All of it; the workspace is empty."""
    prepared = prepare(workspace, plan.customers)
    workspace.rollout.stop(MODEL, reason="one model, as the peers have")
    home = workspace.settings.home
    names = tuple(json.loads((home / "features.json").read_text()))
    matrix = prepared.matrix[:, [prepared.names.index(name) for name in names]]
    if np.isnan(matrix).any():
        raise SystemExit("a feature is null, and JSON has no NaN that all servers read")
    environments = {name: python_of(name.lower(), REQUIREMENTS[name]) for name in plan.peers}
    makers = {BENTOML: bentoml, MLFLOW: mlflow}
    with contextlib.ExitStack() as stack:
        contenders = dict(stack.enter_context(ours(workspace, names)))
        for name, python in environments.items():
            contenders[name] = stack.enter_context(makers[name](python, home / "model.txt"))
        check_agreement(contenders, matrix)
        return report(measure(contenders, matrix, plan, home), plan)


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="as small as it gets, without peers, nothing written")
    parser.add_argument(
        "--seconds", type=float, default=Plan.seconds, help=f"of a run; of a lone client's, {_LONE_TIMES} times that"
    )
    parser.add_argument(
        "--rounds", type=int, default=Plan.rounds, help="runs of each contender in each cell, likewise"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=Plan.rows, help="a request, one cell each")
    parser.add_argument("--concurrency", type=int, nargs="+", default=Plan.concurrency, help="connections, likewise")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="those that take part; by default both")
    given = parser.parse_args()
    plan = Plan(
        seconds=given.seconds, rounds=given.rounds, rows=tuple(given.rows), concurrency=tuple(given.concurrency)
    )
    if given.smoke:
        plan = SMOKE
    if given.peers is not None:
        plan = replace(plan, peers=tuple(given.peers))
    with project() as settings, Workspace.open(settings) as workspace:
        found = run(workspace, plan)
    print(found.markdown())
    if plan == Plan(seconds=plan.seconds, rounds=plan.rounds):
        print(f"written to {found.write('scoring_servers').relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
