"""A cluster of several nodes, and a head that outlives its starter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from heliostat import cluster
from heliostat.settings import RaySettings, Settings

ROOT = Path(__file__).parents[2]

SEVERAL_NODES = """
import os, sys
from heliostat import cluster
cluster.set_environment()
from ray.cluster_utils import Cluster
from heliostat.errors import StorageNotSharedError
from heliostat.settings import OnlineSettings, CatalogSettings, Settings, StorageSettings
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = nodes.address
home = sys.argv[1]
try:
    with cluster.connect(Settings(home=home)):
        print("accepted")
except StorageNotSharedError as error:
    print(f"refused: {error}")
shared = Settings(
    home=home, storage=StorageSettings(shared=True),
    online=OnlineSettings(url="redis://127.0.0.1:1/0"), catalog=CatalogSettings(url="postgresql://nobody@127.0.0.1/x"),
)
with cluster.connect(shared):
    print("accepted")
nodes.shutdown()
"""


@pytest.mark.slow
def test_several_nodes_with_storage_that_one_alone_sees_are_refused(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_NODES, str(home)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    refused, accepted = (line for line in done.stdout.splitlines() if line.startswith(("refused", "accepted")))
    assert refused.startswith("refused: the Ray cluster has 2 nodes")
    for name in ("storage.root", "online.url", "catalog.url", "s3://", "PostgreSQL"):
        assert name in refused
    assert accepted == "accepted"


WORKERS = """
import os, sys, time
from heliostat import cluster
from heliostat.settings import RaySettings, Settings
import ray
with cluster.connect(Settings(home=sys.argv[1], ray=RaySettings(cpus=2, object_store_bytes=100_000_000))):
    here = ray.get([ray.remote(lambda: (time.sleep(0.5), os.getpid())[1]).remote() for _ in range(2)])
    assert set(here) <= set(cluster._own_workers())
print(*(pid for pid in here if cluster._alive(pid)))
"""


@pytest.mark.slow
def test_a_cluster_knows_its_workers_and_takes_them_along(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKERS, str(home)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_a_worker_that_hangs_in_its_own_ending_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_WORKERS_END_S", 0.2)
    titles = ("ray::IDLE", "somebody")
    script = "trap '' TERM HUP; " + " ".join(
        f"(exec -a {title} sleep 60 >/dev/null 2>&1 </dev/null) & echo $!;" for title in titles
    )
    started = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    worker, somebody = (int(pid) for pid in started.stdout.split())
    try:
        limit = time.monotonic() + 10
        while not cluster._is_worker(worker) or "somebody" not in cluster._read_proc(somebody, "cmdline"):
            assert time.monotonic() < limit
            time.sleep(0.01)
        cluster._end_workers([worker, somebody])
        cluster._wait_gone([worker], 5.0)
        assert not cluster._alive(worker)
        assert cluster._alive(somebody), "a number that another process has by now"
    finally:
        os.kill(somebody, signal.SIGKILL)


def test_a_head_is_found_again_and_leaves_nothing_behind(home: Path) -> None:
    settings = Settings(home=home, ray=RaySettings(cpus=2, object_store_bytes=100_000_000))
    before = {path.name for path in Path("/dev/shm").iterdir()}  # noqa: S108 - shared memory, not a scratch folder
    address = cluster.start_head(settings)
    try:
        assert cluster.head_address(home) == address == cluster.start_head(settings)
        head = cluster._read_head(home)
        assert head is not None
        members = cluster._members(Path(head["folder"]))
        assert int(head["pid"]) in members
        assert len(members) > 3
    finally:
        assert cluster.stop_head(home)
    assert not [pid for pid in members if cluster._alive(pid)]
    assert cluster.head_address(home) is None
    assert not cluster.stop_head(home)
    assert not Path(head["folder"]).exists()
    assert {path.name for path in Path("/dev/shm").iterdir()} <= before  # noqa: S108 - as above


_HEIR = """
import os, signal, subprocess, sys, time
def go(*_):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, go)
print("ready", flush=True)
time.sleep(120)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes")
def test_what_a_head_starts_while_it_ends_is_ended_too(home: Path) -> None:
    folder = home / "head"
    folder.mkdir(parents=True)
    environment = {**os.environ, "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder)}
    with subprocess.Popen([sys.executable, "-c", _HEIR], env=environment, stdout=subprocess.PIPE) as head:
        assert head.stdout is not None
        assert head.stdout.readline() == b"ready\n"
        (home / "ray-head.json").write_text(json.dumps({"pid": head.pid, "folder": str(folder)}))
        assert cluster.stop_head(home)
    assert cluster._members(folder) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes")
def test_a_crashed_head_is_noticed(home: Path) -> None:
    (home / "ray-head.json").write_text('{"pid": 999999999, "folder": "/nowhere", "address": "a", "jobs": "b"}')
    assert cluster.head_address(home) is None
    assert cluster.jobs_address(home) is None
    assert cluster.stop_head(home)
    assert not (home / "ray-head.json").exists()


def test_the_environment_of_the_user_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_NBTHREAD", "3")
    cluster.set_environment()
    assert os.environ["RAY_SERVE_HAPROXY_NBTHREAD"] == "3"
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_the_ingress_and_the_proxy_behind_it_get_ports_of_their_own(tmp_path: Path) -> None:
    told = cluster._ingress_environment(tmp_path)
    ports = {name: int(value) for name, value in told.items() if name.endswith("_PORT")}
    assert {"RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"} <= ports.keys()
    assert len(set(ports.values())) == len(ports) == 4
    assert not set(ports.values()) & {8500, 9500}, "Serve's defaults, which a second cluster would find taken"
