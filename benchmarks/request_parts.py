"""Where a request's processor time goes: by process, and within the replica by what the request goes through.

Of HAProxy, the online store's server and each of the replica's threads the operating system tells the time. That of a
thread is shared out by samples of its stacks, which py-spy takes from outside, from an environment of its own.
`benchmarks/serving.py --parts` makes the table.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import load
from benchmarks.peers import Report, facts, python_of
from benchmarks.processes import cpu_s, replica_pid, threads_cpu_s, titled

REQUIREMENTS = ("py-spy>=0.4",)
# Samples a second, and for how long. Each stops the replica for more than a millisecond: with 400 a second what runs
# without Python's lock, trees above all, was seen a third as often as clocks around it said.
_RATE, _SAMPLED_S = 97, 15.0

PARTS: Mapping[str, tuple[str, ...]] = {
    "parse the body": ("serving/requests.py", "serving/open_inference.py"),
    "look features up": ("/online/", "/features/", "storage/online_store.py", "(FeatureLookup."),
    "route": ("experiments/assignment.py", "(ABRouter."),
    "predict": ("models/packaging.py", "models/boosters.py", "lightgbm/", "(ModelRunner."),
    "log": ("serving/prediction_log.py", "storage/streams.py", "Predictor._log_answers"),
    "answer": ("serving/answers.py", "json_response "),
    "check access": ("deployments/access.py", "serving/access.py", "serving/keys.py"),
    "count and trace": (
        "serving/telemetry.py",
        "deployments/meter.py",
        "heliostat/tracing.py",
        "heliostat/telemetry.py",
        "util/metrics.py",
    ),
    "batch, deadlines, ladder": ("heliostat/serving/",),
    "gateway": ("deployments/",),
    "uvicorn, Starlette, Ray Serve": ("uvicorn/", "starlette/", "fastapi/", "ray/serve/", "heliostat/ingress.py"),
}
"""Parts of the replica's time, and what names a frame of theirs: a file's path, or a function's name. The innermost
frame that any of them names decides; of the names that fit it, the first."""

REPLIES, OTHER = "replies of the online store", "event loop and its sockets"
RAY = "Ray's own threads"
HAPROXY, VALKEY = "HAProxy", "the online store's server"
ORDER = (HAPROXY, "uvicorn, Starlette, Ray Serve", "gateway", *(name for name in PARTS), REPLIES, OTHER, RAY, VALKEY)


@dataclass(frozen=True)
class Shared:
    """Where the processor time of a request went.

    Attributes:
        cpu_us: By part, microseconds a request.
        requests_per_s: Without py-spy.
        p50_ms: Likewise.
        samples: Of the stacks of the replica's busiest thread: the event loop's.
    """

    cpu_us: Mapping[str, float]
    requests_per_s: float
    p50_ms: float
    samples: int


def part_of(stack: str) -> str:
    """The part that a stack belongs to; frames outermost first, ``function (file:line)``, parted by semicolons."""
    for frame in reversed(stack.split(";")):
        function, _, file = frame.rpartition(" (")
        shown = f"({function} {file}"
        for part, names in PARTS.items():
            if any(name in shown for name in names):
                return part
    return REPLIES if "asyncio/streams.py" in stack or "redis/" in stack else OTHER


def shares(stacks: Iterable[str]) -> dict[int, Counter[str]]:
    """Samples by thread and part.

    Args:
        stacks: Lines of py-spy's raw format: ``thread (ID): NAME``, frames, and how often that was seen.
    """
    found: dict[int, Counter[str]] = {}
    for line in stacks:
        stack, _, count = line.rpartition(" ")
        thread, _, frames = stack.partition(";")
        number = int(thread.partition("(")[2].partition(")")[0])
        found.setdefault(number, Counter())[part_of(frames)] += int(count)
    return found


def shared_out(spent_us: Mapping[int, float], seen: Mapping[int, Counter[str]]) -> dict[str, float]:
    """Time by part.

    Args:
        spent_us: By thread.
        seen: Samples by thread and part; threads that run no Python have none.
    """
    parts: dict[str, float] = {}
    for thread, spent in spent_us.items():
        counts = seen.get(thread, Counter({RAY: 1}))
        for part, count in counts.items():
            parts[part] = parts.get(part, 0.0) + spent * count / counts.total()
    return parts


class Sampler:
    """py-spy, in an environment of its own."""

    def __init__(self) -> None:
        self._program = python_of("py-spy", REQUIREMENTS).parent / "py-spy"

    @contextlib.contextmanager
    def watching(self, pid: int, seconds: float, file: Path) -> Iterator[None]:
        """Sample a process's running threads while the block runs, which takes at least as long.

        Args:
            pid: Whose.
            seconds: How long.
            file: For what is seen.

        Raises:
            SystemExit: If py-spy can't; it wants to trace the process.
        """
        options = ["--pid", str(pid), "--duration", str(max(1, round(seconds))), "--rate", str(_RATE), "--threads"]
        command = [str(self._program), "record", *options, "--format", "raw", "--output", str(file)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            yield
            told, _ = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
        if process.returncode or not file.exists():
            raise SystemExit(f"py-spy can't watch the replica: {told}")


def measure(
    url: str, valkey_pid: int, folder: Path, *, entities: int, customers: int, concurrency: int, seconds: float
) -> Shared:
    """Where the time of one kind of request goes.

    Args:
        url: The graph's.
        valkey_pid: The online store's server.
        folder: For py-spy's files.
        entities: A request.
        customers: To draw them from.
        concurrency: Connections.
        seconds: Of the run without py-spy, at least 1.
    """
    replica = replica_pid()
    processes = {HAPROXY: titled(b"haproxy"), VALKEY: [valkey_pid]}
    options = {"entities": entities, "population": customers, "concurrency": concurrency}
    load.run(f"{url}/predict", seconds=min(seconds, 1.0), **options)
    before, threads = {name: cpu_s(pids) for name, pids in processes.items()}, threads_cpu_s(replica)
    found = load.all_of(load.run(f"{url}/predict", seconds=seconds, **options))
    each = 1e6 / found["requests"]
    spent = {name: (cpu_s(pids) - before[name]) * each for name, pids in processes.items()}
    in_threads = {at: (now - threads.get(at, 0.0)) * each for at, now in threads_cpu_s(replica).items()}

    file = folder / f"stacks-{entities}-{concurrency}"
    with ThreadPoolExecutor(1) as pool, Sampler().watching(replica, _SAMPLED_S, file):
        pool.submit(load.run, f"{url}/predict", seconds=_SAMPLED_S + 1.0, **options).result()
    seen = shares(file.read_text().splitlines())
    busiest = max(in_threads, key=in_threads.__getitem__)
    if busiest not in seen:
        raise SystemExit("py-spy didn't see the replica's busiest thread at work")
    parts = shared_out(in_threads, seen)
    return Shared(parts | spent, found["requests_per_s"], found["p50_ms"], seen[busiest].total())


def report(cells: Mapping[tuple[int, int], Shared], *, seconds: float, customers: int) -> Report:
    """The table: a part a row, a kind of request a column."""
    names = [name for name in dict.fromkeys(ORDER) if any(name in cell.cpu_us for cell in cells.values())]
    rows: list[list[object]] = [[name, *(cell.cpu_us.get(name, 0.0) for cell in cells.values())] for name in names]
    rows.append(["together", *(sum(cell.cpu_us.values()) for cell in cells.values())])
    rows.append(["median wait of a client", *(cell.p50_ms * 1e3 for cell in cells.values())])
    return Report(
        title="Serving: where the processor time of a request goes",
        columns=[
            "µs a request",
            *(
                f"{entities} {'entity' if entities == 1 else 'entities'}, {at_once} at once"
                for entities, at_once in cells
            ),
        ],
        rows=rows,
        notes=(
            (
                "The fused graph behind HAProxy as in `benchmarks/serving.py`: a split of two versions, every"
                " prediction durable in the log before its answer."
            ),
            (
                "Processor time, user and system, of all requests of a run by their number. With one request at once"
                " the median wait is longer than the sum by the time in which no process of the server ran: wake-ups,"
                " and the client's own work."
            ),
            (
                "A thread's time is shared out by where it was in samples, of the event loop's"
                f" {', '.join(f'{cell.samples:,}' for cell in cells.values())}; {_RATE} a second at most: by the"
                " innermost frame whose file says what it is for. Threads that run no Python are Ray's own."
            ),
            (
                f"Runs of {seconds:g} s without py-spy for times, of {_SAMPLED_S:g} s with it for shares;"
                f" {', '.join(f'{cell.requests_per_s:,.0f}' for cell in cells.values())} requests/s without it."
            ),
        ),
        facts=facts("ray", "uvicorn", "lightgbm", "redis", customers=customers),
    )
