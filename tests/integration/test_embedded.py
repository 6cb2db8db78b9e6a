"""The embedded server: found again, shared, and gone with its last user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from heliostat.errors import EmbeddedServerError
from heliostat.storage import embedded
from heliostat.storage.embedded import EmbeddedServer

USER = """
import sys
from pathlib import Path
from heliostat.storage.embedded import EmbeddedServer
server = EmbeddedServer.ensure(Path(sys.argv[1]), keep="keep" in sys.argv)
print(server.url, flush=True)
sys.stdin.readline()
"""


def _user(home: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USER, str(home), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": "platform"},
    )


def _url_of(user: subprocess.Popen[str]) -> str:
    assert user.stdout is not None
    return user.stdout.readline().strip()


def _leave(user: subprocess.Popen[str]) -> None:
    user.communicate("\n", timeout=20)
    assert user.returncode == 0


def _client(url: str) -> Any:
    return redis.Redis.from_url(url)


def _record(home: Path) -> dict[str, Any]:
    return json.loads((home / "valkey" / "server.json").read_text())


def _wait_until(condition: Any, timeout_s: float = 20.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if condition():
            return True
        time.sleep(0.01)
    return False


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_last_user_out_stops_the_server_and_leaves_no_trace_but_the_data(home: Path) -> None:
    server = EmbeddedServer.ensure(home)
    pid, socket = _record(home)["pid"], Path(server.url.removeprefix("unix://"))
    _client(server.url).set("kept", 1)
    server.close()
    assert not _running(pid)
    assert not socket.parent.exists()
    assert not (home / "valkey" / "server.json").exists()
    with EmbeddedServer.ensure(home) as again:
        assert _client(again.url).get("kept") == b"1"


def test_server_stays_while_another_handle_is_open(home: Path) -> None:
    first, second = EmbeddedServer.ensure(home), EmbeddedServer.ensure(home)
    first.close()
    first.close()
    assert first.url == second.url == EmbeddedServer.running(home)
    assert _client(second.url).ping()
    second.close()
    assert EmbeddedServer.running(home) is None


def test_next_process_finds_the_server_that_an_earlier_one_started(home: Path) -> None:
    with EmbeddedServer.ensure(home) as server:
        pid = _record(home)["pid"]
        user = _user(home)
        assert _url_of(user) == server.url
        assert _record(home)["pid"] == pid
        _leave(user)
        assert _running(pid)


def test_server_outlives_the_process_that_started_it_while_it_has_users(home: Path) -> None:
    starter = _user(home)
    url = _url_of(starter)
    with EmbeddedServer.ensure(home):
        _leave(starter)
        assert _client(url).ping()
    assert EmbeddedServer.running(home) is None


def test_two_processes_starting_at_once_share_one_server(home: Path) -> None:
    users = [_user(home) for _ in range(3)]
    urls = {_url_of(user) for user in users}
    assert len(urls) == 1
    pids = {_client(url).info()["process_id"] for url in urls}
    assert pids == {_record(home)["pid"]}
    for user in users:
        _leave(user)
    assert EmbeddedServer.running(home) is None


def test_killed_user_leaves_no_server_behind(home: Path) -> None:
    user = _user(home)
    _url_of(user)
    pid = _record(home)["pid"]
    user.kill()
    user.communicate()
    assert _wait_until(lambda: not _running(pid))
    assert _wait_until(lambda: not (home / "valkey" / "server.json").exists())


def test_crashed_server_is_started_again_with_its_data(home: Path) -> None:
    with EmbeddedServer.ensure(home) as first:
        _client(first.url).set("kept", 1)
        crashed = _record(home)["pid"]
        os.kill(crashed, signal.SIGKILL)
        assert _wait_until(lambda: EmbeddedServer.running(home) is None)
        with EmbeddedServer.ensure(home) as second:
            assert second.url == first.url
            assert _record(home)["pid"] != crashed
            assert _client(second.url).get("kept") == b"1"


def test_stale_record_with_the_pid_of_a_stranger_is_not_believed(home: Path) -> None:
    (home / "valkey").mkdir(parents=True)
    stale = {"pid": os.getpid(), "socket": str(home / "gone" / "valkey.sock"), "token": "0", "keep": False}
    (home / "valkey" / "server.json").write_text(json.dumps(stale))
    assert EmbeddedServer.running(home) is None
    with EmbeddedServer.ensure(home) as server:
        assert _client(server.url).ping()


@pytest.mark.parametrize("record", ["", "{", "[]", '{"pid": 1}'])
def test_broken_record_is_replaced_by_what_the_running_server_says(home: Path, record: str) -> None:
    with EmbeddedServer.ensure(home):
        pid = _record(home)["pid"]
        (home / "valkey" / "server.json").write_text(record)
        with EmbeddedServer.ensure(home):
            assert _record(home)["pid"] == pid


def test_server_whose_socket_was_removed_is_started_again_with_its_data(home: Path) -> None:
    with EmbeddedServer.ensure(home) as first:
        _client(first.url).set("kept", 1)
        Path(first.url.removeprefix("unix://")).unlink()
        with EmbeddedServer.ensure(home) as second:
            assert _client(second.url).get("kept") == b"1"


def test_kept_server_outlives_its_users_until_it_is_stopped(home: Path) -> None:
    user = _user(home, "keep")
    url = _url_of(user)
    _leave(user)
    assert EmbeddedServer.running(home) == url
    with EmbeddedServer.ensure(home):
        pid = _record(home)["pid"]
    assert EmbeddedServer.running(home) == url
    assert EmbeddedServer.stop(home)
    assert not _running(pid)
    assert not EmbeddedServer.stop(home)
    assert EmbeddedServer.running(home) is None


def test_stopping_beneath_a_user_leaves_its_close_harmless(home: Path) -> None:
    server = EmbeddedServer.ensure(home)
    assert EmbeddedServer.stop(home)
    server.close()
    assert EmbeddedServer.running(home) is None


def test_forked_child_neither_holds_nor_stops_the_server(home: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from heliostat.storage.embedded import EmbeddedServer
home = Path(sys.argv[1])
server = EmbeddedServer.ensure(home)
ready, go = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    server.close()
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    os._exit(0)
os.read(ready[0], 1)
assert EmbeddedServer.running(home) == server.url, "the child's close stopped the parent's server"
server.close()
assert EmbeddedServer.running(home) is None, "the living child kept the server"
os.write(go[1], b"x")
os.waitpid(child, 0)
"""
    subprocess.run(
        [sys.executable, "-c", script, str(home)],
        check=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": "platform"},
    )


def test_ctrl_c_of_the_terminal_does_not_reach_the_server(home: Path) -> None:
    with EmbeddedServer.ensure(home) as server:
        pid = _record(home)["pid"]
        assert os.getpgid(pid) != os.getpgid(0)
        assert os.getsid(pid) != os.getsid(0)
        assert _client(server.url).ping()


def test_socket_is_private_and_short_however_deep_the_home_is(home: Path) -> None:
    deep = home.joinpath(*["a-folder-with-a-long-name"] * 6)
    with EmbeddedServer.ensure(deep) as server:
        socket = Path(server.url.removeprefix("unix://"))
        assert len(os.fsencode(socket)) <= 107
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert _client(server.url).config_get("port") == {"port": "0"}


def test_long_temporary_directory_is_passed_over(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path.joinpath(*["long" * 10] * 3)
    long.mkdir(parents=True)
    monkeypatch.setattr(embedded.tempfile, "gettempdir", lambda: str(long))
    with EmbeddedServer.ensure(home) as server:
        assert _client(server.url).ping()


def test_every_write_is_in_the_append_only_file(home: Path) -> None:
    with EmbeddedServer.ensure(home) as server:
        wanted = {"appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction"}
        assert {name: _client(server.url).config_get(name)[name] for name in wanted} == wanted


def test_server_that_cannot_start_says_why_and_where_to_look(home: Path) -> None:
    with EmbeddedServer.ensure(home) as server:
        _client(server.url).set("a", 1)
    (home / "valkey" / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(EmbeddedServerError, match=r"valkey\.log"):
        EmbeddedServer.ensure(home)
    assert EmbeddedServer.running(home) is None


def test_what_is_accepted_is_synced_as_the_setting_says(home: Path) -> None:
    with EmbeddedServer.ensure(home, fsync="always") as server, redis.Redis.from_url(server.url) as client:
        assert client.config_get("appendfsync") == {"appendfsync": "always"}


def test_a_server_whose_home_was_removed_ends_with_its_last_user(home: Path) -> None:
    user = _user(home / "gone")
    url, pid = _url_of(user), _record(home / "gone")["pid"]
    shutil.rmtree(home / "gone")
    assert _client(url).ping()
    user.kill()
    user.communicate()
    assert _wait_until(lambda: not _running(pid))
    assert _wait_until(lambda: not Path(url.removeprefix("unix://")).parent.exists())
