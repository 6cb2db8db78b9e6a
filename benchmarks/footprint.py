"""What things take: bytes of rings, of the log, of events; memory of the processes and of a version.

    python benchmarks/footprint.py           # a minute; writes benchmarks/results/footprint.{md,json}
    python benchmarks/footprint.py --smoke   # seconds: does it run

The fused graph on Ray Serve, with the data of `benchmarks/serving.py`. The online store's bytes are those that the
server itself says a key takes; the tables' are those of the files that their newest version has.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from deltalake import DeltaTable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import load
from benchmarks.memory import held_bytes
from benchmarks.peers import ROOT, Report, facts, tree_bytes
from benchmarks.processes import replica_pid, titled
from benchmarks.served import EVENTS_A_CUSTOMER, MODEL, TREES, graph, prepare, project
from heliostat.ingestion.sink import Sink
from heliostat.workspace import Workspace

CUSTOMERS = 2_000
_VERSIONS = 100
_MIB = 2**20

Row = tuple[str, float, str]
"""What, how much, and of which unit."""


def keys_of(workspace: Workspace) -> dict[str, list[int]]:
    """What each key of the project takes at the server, in bytes, by the kind of key."""
    client, root = workspace.online.client, workspace.online.keys.root
    found: dict[str, list[int]] = defaultdict(list)
    for key in client.scan_iter(match=f"{root}:*", count=1_000):
        name = key.decode()
        kind, _, rest = name.removeprefix(f"{root}:").partition(":")
        about = " ".join(["", *rest.split(":")[:2]]) if kind == "r" else ""
        found[kind + about].append(int(client.memory_usage(key, samples=0) or 0))
    return dict(found)


def table_bytes(folder: Path) -> tuple[int, int]:
    """Rows and bytes of all Delta tables below a folder."""
    rows = size = 0
    for log in folder.rglob("_delta_log"):
        table = DeltaTable(log.parent)
        size += sum(Path(path.removeprefix("file://")).stat().st_size for path in table.file_uris())
        rows += table.count()
    return rows, size


def store(workspace: Workspace, customers: int) -> Iterator[Row]:
    """Rings, recent ids and events, before anything is predicted."""
    found = keys_of(workspace)
    for kind, sizes in sorted(found.items()):
        if kind.startswith("r "):
            source, entity = kind.split()[1:]
            yield f"all rings over {source} of a {entity}", sum(sizes) / len(sizes), "bytes an entity"
    events = customers * EVENTS_A_CUSTOMER
    yield "id of an event, kept for de-duplication", sum(found["d"]) / len(found["d"]), "bytes an event"
    yield "event in its stream", sum(found["events"]) / events, "bytes an event"


def send(url: str, *, customers: int, entities: int, concurrency: int, seconds: float) -> int:
    """Send requests for a while; how many entities were answered.

    Raises:
        SystemExit: If a request failed.
    """
    found = load.run(
        f"{url}/predict",
        seconds=seconds,
        entities=entities,
        population=customers,
        concurrency=concurrency,
        seed=entities,
    )
    return int(load.all_of(found)["requests"]) * entities


def logged(workspace: Workspace, url: str, customers: int, seconds: float) -> Iterator[Row]:
    """A prediction's row, as it waits in the stream: by requests alone, many at once, and large ones."""
    stream, client = workspace.streams.record_stream("predictions"), workspace.online.client
    for what, entities, concurrency in (
        ("1 entity a request, 1 at once", 1, 1),
        ("1 entity a request, 16 at once", 1, 16),
        ("100 entities a request, 16 at once", 100, 16),
    ):
        client.xtrim(stream, maxlen=0, approximate=False)
        empty = int(client.memory_usage(stream, samples=0) or 0)
        rows = send(url, customers=customers, entities=entities, concurrency=concurrency, seconds=seconds)
        taken = int(client.memory_usage(stream, samples=0) or 0) - empty
        yield f"prediction in the stream, {what}", taken / rows, "bytes a prediction"


def tables(workspace: Workspace, customers: int) -> Iterator[Row]:
    """What the sink makes of the streams: the rows of the last run above, and all events."""
    Sink.of(workspace).drain_once()
    root = Path(workspace.settings.data_root)
    predictions = sum_of(table_bytes(folder) for folder in root.rglob("predictions") if folder.is_dir())
    yield "prediction in its table", predictions[1] / predictions[0], "bytes a prediction"
    events = [
        table_bytes(folder)
        for folder in root.rglob("events")
        if folder.is_dir() and "predictions" not in folder.parts
    ]
    total = sum_of(events)
    if total[0] != customers * EVENTS_A_CUSTOMER:
        raise SystemExit(f"{total[0]} rows of events in the tables, not {customers * EVENTS_A_CUSTOMER}")
    yield "event in its table", total[1] / total[0], "bytes an event"


def sum_of(sizes: Iterator[tuple[int, int]] | list[tuple[int, int]]) -> tuple[int, int]:
    """Rows and bytes together."""
    rows, size = 0, 0
    for each in sizes:
        rows, size = rows + each[0], size + each[1]
    return rows, size


def version(workspace: Workspace) -> Iterator[Row]:
    """A loaded version, in this process: each with a booster of its own that has predicted."""
    matrix = np.zeros((1, len(workspace.definitions.model(MODEL).feature_names)))
    package = workspace.models.package(MODEL, 1)
    held = []
    before = 0
    # The first hundred take what training left free.
    for number in range(2 * _VERSIONS):
        if number == _VERSIONS:
            gc.collect()
            before = held_bytes(os.getpid())[1]
        model = workspace.models.package(MODEL, 1).load()
        model.predict(matrix)
        held.append(model)
    taken = (held_bytes(os.getpid())[1] - before) / _VERSIONS
    yield f"version of {TREES} trees, its text", len(package.booster_text) / 1024, "KiB"
    yield f"version of {TREES} trees, loaded", taken / 1024, "KiB"
    yield (
        f"version of {TREES} trees, as counted against serving.model_memory_bytes",
        package.memory_bytes / 1024,
        "KiB",
    )


def processes(url: str, customers: int, seconds: float) -> Iterator[Row]:
    """Memory of the processes, idle and after they were kept busy."""
    pid = replica_pid()
    yield "gateway replica, idle: resident", held_bytes(pid)[0] / _MIB, "MiB"
    yield "gateway replica, idle: of it no file", held_bytes(pid)[1] / _MIB, "MiB"
    for entities in (1, 100):
        send(url, customers=customers, entities=entities, concurrency=64, seconds=seconds)
    yield "gateway replica, after load: resident", held_bytes(pid)[0] / _MIB, "MiB"
    yield "gateway replica, after load: of it no file", held_bytes(pid)[1] / _MIB, "MiB"
    haproxy = [held_bytes(each)[0] for each in titled(b"haproxy")]
    yield "HAProxy", sum(haproxy) / _MIB, "MiB"
    rest = tree_bytes(without=(pid, *titled(b"haproxy"))) - held_bytes(os.getpid())[0]
    yield "Ray and Ray Serve beside them, a node", rest / _MIB, "MiB"


def report(rows: list[Row]) -> Report:
    """The table."""
    return Report(
        title="What things take",
        columns=["what", "how much", "unit"],
        rows=rows,
        notes=(
            f"{CUSTOMERS} customers with {EVENTS_A_CUSTOMER} purchases each; the churn example's views and model.",
            "In the online store: what the server says of each key (MEMORY USAGE), with its name and overhead.",
            "In tables: the newest version's files as the sink's first move leaves them, before they are compacted.",
            "Predictions in their table are those of 100 entities a request.",
            f"A loaded version: {_VERSIONS} of them in one process, by what it held in memory that is no file.",
            "Ray beside them: proportional shares of pages, with its workers that stay warm and its object store.",
        ),
        facts=facts("ray", "lightgbm", "redis", "deltalake"),
    )


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="as small as it gets, nothing written")
    smoke = parser.parse_args().smoke
    customers, seconds = (50, 0.3) if smoke else (CUSTOMERS, 3.0)
    with project() as settings, Workspace.open(settings) as workspace:
        prepare(workspace, customers)
        rows = [*store(workspace, customers), *version(workspace)]
        with graph(workspace) as url:
            rows += processes(url, customers, seconds)
            rows += logged(workspace, url, customers, seconds)
        rows += tables(workspace, customers)
    found = report(rows)
    print(found.markdown())
    if not smoke:
        print(f"written to {found.write('footprint').relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
