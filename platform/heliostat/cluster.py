"""Ray: joined where one is given, started here where none is, and stopped by whoever started it.

The one place that sets Ray's environment. Ray's own ``ray stop`` ends every Ray of the
machine, so a kept cluster (`start_head`) is stopped by its process id alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._raylet import Config  # type: ignore[attr-defined] # compiled, without types

from heliostat.errors import StorageError, StorageNotSharedError
from heliostat.ports import free_ports
from heliostat.settings import Settings

RAY_ENVIRONMENT = {
    # Serve: a C ingress, gRPC between the stages, user code on the replica's own loop.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    # The ingress's metrics come from replicas. Otherwise it writes a line a request to a process that parses them in
    # Python, which takes as long as the ingress does; what no replica answers is in HAProxy's own metrics.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # Nor does anybody read a line a request at the port of syslog, unless he says so; one of a thousand is left.
    "RAY_SERVE_HAPROXY_LOG_TARGET": "127.0.0.1:514 sample 1:1000",
    # A replica that goes is sent requests until the ingress has heard of it: one that hangs up meanwhile loses them.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    # What replicas have under way is told this often, for autoscaling: ten seconds would be late.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "heliostat.ingress:middlewares",
    # Replicas answer users, and are Ray's workers: at Ray's own 15 everything else on their machine goes before them.
    "RAY_worker_niceness": "0",
    # Workers stay warm: a job of a second shouldn't pay for a start of ten.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_num_workers_soft_limit": "8",
    # The V2 Parquet reader starts 32 actors a read.
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    # Or its wrapper loses what an error of ours says, and the exit code with it.
    "RAY_DATA_RAISE_ORIGINAL_MAP_EXCEPTION": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # Tune's new output prints boxes however quiet it is asked to be.
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # A forgotten iterator mustn't start a second cluster at exit.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    # Whoever reaches Ray's ports can run code: only those who can read the user's token may.
    "RAY_AUTH_MODE": "token",
}

_HEAD_FILE = "ray-head.json"
_WORKERS_END_S = 5.0
_START_LIMIT_S = 90.0


def set_environment() -> None:
    """Set what makes Ray quick on small machines, where the user hasn't set otherwise."""
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ["RAY_AUTH_MODE"] == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        _ensure_token(Path.home() / ".ray" / "auth_token")
    # Ray reads its environment when it is imported, and connecting to an address never turns tokens on.
    Config.initialize("")


def _ensure_token(path: Path) -> None:
    """Write a token where all of Ray's clients look for one, unless there is one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))


def logical_cpus(settings: Settings) -> int:
    """How many CPUs Ray is told of: more than a small machine has, or actors wait for each other."""
    return settings.ray.cpus or max(8, os.cpu_count() or 1)


def cpus_a_task() -> float:
    """How many of Ray's CPUs a task should ask for that keeps a core busy.

    More than one where Ray was told of more CPUs than the machine has (see `logical_cpus`): eight tasks
    at a time on two cores only start eight processes, each of which imports everything.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) != 1:
        return 1.0
    return max(1.0, float(nodes[0]["Resources"].get("CPU", 1.0)) / (os.cpu_count() or 1))


@contextlib.contextmanager
def connect(settings: Settings) -> Iterator[None]:
    """Join the Ray cluster of RAY_ADDRESS or of `heliostat up`, or start one for as long as the block runs.

    Inside another connection it does nothing.

    Raises:
        StorageNotSharedError: If the cluster has several nodes and storage that one of them alone sees.
    """
    if ray.is_initialized():
        check_storage(settings)
        yield
        return
    set_environment()
    own = contextlib.ExitStack()
    address = os.environ.get("RAY_ADDRESS") or head_address(settings.home)
    # Ray writes these down in its logs. Secrets go in the settings that tasks are given, and by the environment.
    environment = {"env_vars": settings.environment(secrets=False)}
    if address:
        ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level="WARNING")
    else:
        folder = own.enter_context(tempfile.TemporaryDirectory(prefix="hs-serve-", ignore_cleanup_errors=True))
        os.environ.update(_ingress_environment(Path(folder)))
        os.environ.update(dict(settings.environment().items() - environment["env_vars"].items()))
        with _temporary_files(folder):
            ray.init(
                num_cpus=logical_cpus(settings),
                object_store_memory=settings.ray.object_store_bytes,
                include_dashboard=settings.ray.dashboard,
                runtime_env=environment,
                log_to_driver=False,
                logging_level="WARNING",
            )
    # Ray Data tells of every execution, at INFO; importing it sets that, so it is set back here.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # Serve tells of every step; its warnings are enough.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        check_storage(settings)
        yield
    finally:
        workers = [] if address else _own_workers()
        ray.shutdown()
        _end_workers(workers)
        own.close()


def is_given(settings: Settings) -> bool:
    """Whether `connect` joins a cluster, rather than start one: that takes ten seconds, which small work doesn't."""
    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS") or head_address(settings.home))


@contextlib.contextmanager
def _temporary_files(folder: str) -> Iterator[None]:
    """Processes started inside leave their temporary files in a folder that somebody removes; Ray's logs stay."""
    before = {name: os.environ.get(name) for name in ("TMPDIR", "RAY_TMPDIR")}
    os.environ.update(TMPDIR=folder, RAY_TMPDIR=before["RAY_TMPDIR"] or tempfile.gettempdir())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _ingress_environment(folder: Path) -> dict[str, str]:
    """Files and ports of Serve's HAProxy and of the proxy behind it, so that clusters on one machine keep apart."""
    metrics_port, stats_port, fallback_port, fallback_grpc_port = free_ports("127.0.0.1", 4)
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc_port),
    }


def check_storage(settings: Settings) -> None:
    """Refuse storage that some nodes of the connected cluster can't see.

    Raises:
        StorageNotSharedError: Naming the settings.
    """
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    if nodes < 2:
        return
    local = []
    if "://" not in settings.data_root and not settings.storage.shared:
        local.append(f"storage.root ({settings.data_root})")
    if settings.online.url is None or settings.online.url.startswith("unix:"):
        local.append(f"online.url ({settings.online.url or 'embedded'})")
    if settings.catalog_url.startswith("sqlite"):
        local.append(f"catalog.url ({settings.catalog_url})")
    if local:
        raise StorageNotSharedError(nodes, tuple(local))


def head_address(home: Path) -> str | None:
    """The address of the head that `heliostat up` started for this home, if it runs."""
    head = _read_head(home)
    return None if head is None else str(head["address"])


def jobs_address(home: Path) -> str | None:
    """Where the same head takes jobs: what ``ray job submit --address`` wants."""
    head = _read_head(home)
    return None if head is None else str(head["jobs"])


def start_head(settings: Settings) -> str:
    """Start a Ray head that outlives this process, with the job API; returns its address.

    An already running head of the same home is kept.

    Raises:
        StorageError: If it doesn't come up; the message has its last lines.
    """
    running = head_address(settings.home)
    if running:
        return running
    set_environment()
    settings.home.mkdir(parents=True, exist_ok=True)
    # Ray puts unix sockets below this folder, and their paths may have 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="hs-ray-"))
    port, jobs_port, client_port, agent_port = free_ports("127.0.0.1", 4)
    log = settings.home / "ray-head.log"
    command = [
        str(Path(sys.executable).with_name("ray")),
        *("start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
        f"--port={port}",
        f"--temp-dir={folder}",
        f"--num-cpus={logical_cpus(settings)}",
        f"--object-store-memory={settings.ray.object_store_bytes}",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={jobs_port}",
        f"--ray-client-server-port={client_port}",
        # Its default is one number for all clusters of a machine, and without an agent no job is taken.
        f"--dashboard-agent-listen-port={agent_port}",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own program and numbers
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Its dashboard's processes leave empty folders behind: in a place that goes with the head.
            env={
                **os.environ,
                **_ingress_environment(folder),
                **settings.environment(),
                "PATH": _path(),
                "TMPDIR": str(folder),
            },
        )
    head = {
        "pid": process.pid,
        "folder": str(folder),
        "address": f"127.0.0.1:{port}",
        "jobs": f"http://127.0.0.1:{jobs_port}",
    }
    (settings.home / _HEAD_FILE).write_text(json.dumps(head))
    limit = time.monotonic() + _START_LIMIT_S
    while not (_listens(port) and _listens(jobs_port) and _listens(agent_port)):
        if process.poll() is not None or time.monotonic() > limit:
            stop_head(settings.home)
            last = log.read_text(errors="replace")[-800:]
            raise StorageError(f"Ray's head didn't start; the end of {log}:\n{last}")
        time.sleep(0.1)
    return str(head["address"])


def _path() -> str:
    """So that a job's ``python`` is this one, also where its environment isn't activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def stop_head(home: Path) -> bool:
    """Stop the head of this home and all its processes, and remove its files; whether there was one."""
    head = _read_head(home, alive=False)
    if head is None:
        return False
    pid = int(head["pid"])
    members = _members(Path(head["folder"]))
    if _alive(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        _wait_gone([pid], 4.0)
    for last in (signal.SIGTERM, signal.SIGKILL):
        # Looked for again: the ingress starts a process anew whenever a replica goes, also while its head does.
        left = [each for each in {*members, *_members(Path(head["folder"]))} if _alive(each)]
        for each in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, last)
        _wait_gone(left, 3.0)
    shutil.rmtree(str(head["folder"]), ignore_errors=True)
    (home / _HEAD_FILE).unlink(missing_ok=True)
    return True


def _read_head(home: Path, *, alive: bool = True) -> dict[str, Any] | None:
    try:
        head: dict[str, Any] = json.loads((home / _HEAD_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return head if not alive or _alive(int(head["pid"])) else None


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return _signals(pid) if not Path("/proc/self").exists() else False
    return state != "Z"


def _signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _members(folder: Path) -> list[int]:
    """Every process that a head started, however far down, also where those between have gone.

    They are told by their environment, in which the head's folder stands, and by their parents: a
    process that has changed its title may have overwritten the one, an orphan has lost the other.
    """
    mark = f"RAY_SERVE_HAPROXY_SERVER_STATE_BASE={folder}".encode()
    marked: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                marked.append(int(entry.name))
    return sorted({*marked, *_below(marked)})


def _own_workers() -> list[int]:
    """The workers of the cluster that this process has started."""
    raylets = [pid for pid in _below([os.getpid()]) if _read_proc(pid, "comm").strip() == "raylet"]
    return [pid for pid in _below(raylets) if _is_worker(pid)]


def _end_workers(pids: list[int]) -> None:
    """See to it that workers whose raylet has gone go as well: one that hangs in its own ending stays for ever."""
    _wait_gone(pids, _WORKERS_END_S)
    for pid in pids:
        if _alive(pid) and _is_worker(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _is_worker(pid: int) -> bool:
    return _read_proc(pid, "cmdline").startswith("ray::")


def _read_proc(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _below(pids: list[int]) -> set[int]:
    """All processes that these have started, however far down."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = set[int](), list(pids)
    while waiting:
        own = [child for child in children.get(waiting.pop(), ()) if child not in found]
        found.update(own)
        waiting += own
    return found


def _wait_gone(pids: list[int], limit_s: float) -> None:
    limit = time.monotonic() + limit_s
    while any(_alive(pid) for pid in pids) and time.monotonic() < limit:
        with contextlib.suppress(ChildProcessError, OSError):
            os.waitpid(-1, os.WNOHANG) if any(_is_child(pid) for pid in pids) else None
        time.sleep(0.05)


def _is_child(pid: int) -> bool:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
    except (OSError, IndexError, ValueError):
        return False


def _listens(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0
