"""Names, bytes and errors of the online store, without a server."""

from __future__ import annotations

import asyncio
import pickle
import struct
from pathlib import Path

import pytest

from heliostat.errors import OnlineStoreUnavailableError, StorageError
from heliostat.settings import OnlineSettings, Settings
from heliostat.storage.event_script import APPLY_EVENTS
from heliostat.storage.history_script import WRITE_RINGS
from heliostat.storage.online_store import (
    AsyncOnlineStore,
    OnlineConfig,
    OnlineKeys,
    OnlineStore,
    StoreInfo,
)
from heliostat.storage.rings import RingDescriptor

KEYS = OnlineKeys("hs", "shop")


def hash_tag(key: str) -> str:
    """What a Redis Cluster hashes: between the first { and the next }."""
    _, _, rest = key.partition("{")
    return rest.partition("}")[0]


@pytest.mark.parametrize("text", ["12345", "a:b", "{other}", "}{", "ü|{b1}"])
def test_all_keys_of_an_entity_hash_by_its_bucket_whatever_its_key_looks_like(text: str) -> None:
    keys = [
        KEYS.bundle("purchases", "customer", text, 7),
        KEYS.seen("purchases", "customer", text, 7),
        KEYS.events("purchases", 7),
        KEYS.epoch(7),
        KEYS.fence("purchases", "customer", 7),
        KEYS.bucket_state("behaviour@1", 7),
    ]
    assert {hash_tag(key) for key in keys} == {"b7"}


def test_keys_of_projects_sources_and_entities_never_meet() -> None:
    keys = [
        OnlineKeys(prefix, project).bundle(source, entity, text, 1)
        for prefix in ("hs", "ht")
        for project in ("shop", "shop2")
        for source in ("a", "a2")
        for entity in ("b", "b2")
        for text in ("1", "11")
    ]
    assert len(set(keys)) == 32


def test_the_address_is_shown_without_its_password() -> None:
    config = OnlineConfig("rediss://user:secret@example.com:6380/2", project="shop")
    assert config.shown_url == "rediss://example.com:6380/2"
    assert "secret" not in repr(config)


def test_a_config_survives_pickling() -> None:
    config = OnlineConfig("redis://localhost:6379/0", project="shop", cluster=True)
    assert pickle.loads(pickle.dumps(config)) == config


def test_settings_give_a_config() -> None:
    online = OnlineSettings(url="redis://localhost:1", key_prefix="x", timeout_s=0.5, max_connections=3)
    config = OnlineConfig.of(Settings(project="shop", online=online))
    assert config == OnlineConfig("redis://localhost:1", "shop", "x", timeout_s=0.5, max_connections=3)


def test_settings_without_an_address_say_what_is_missing() -> None:
    with pytest.raises(OnlineStoreUnavailableError, match="online.url isn't set"):
        OnlineConfig.of(Settings())


def test_a_server_that_isnt_there_is_reported_with_its_address(tmp_path: Path) -> None:
    config = OnlineConfig(f"unix://{tmp_path}/no.sock", project="shop")
    with OnlineStore(config) as store, pytest.raises(StorageError, match=r"no\.sock doesn't answer"):
        store.ping()


def test_a_server_that_isnt_there_is_reported_to_asyncio_as_well(tmp_path: Path) -> None:
    async def ask() -> None:
        async with AsyncOnlineStore(OnlineConfig(f"unix://{tmp_path}/no.sock", project="shop")) as store:
            await store.read(["a"])

    with pytest.raises(OnlineStoreUnavailableError, match=r"no\.sock doesn't answer"):
        asyncio.run(ask())


def test_nothing_to_read_asks_nobody(tmp_path: Path) -> None:
    with OnlineStore(OnlineConfig(f"unix://{tmp_path}/no.sock", project="shop")) as store:
        assert store.read([]) == []
        assert store.get_many([]) == {}


def test_a_descriptor_tells_the_server_all_it_needs() -> None:
    operators = (("add", 1), ("first", 3), ("max", 1), ("add", 300), ("moments", 3), ("or", 1))
    packed = RingDescriptor(b"sixteen bytes id", 32, True, operators, b"\x00" * 48, 90_000).pack()
    assert struct.unpack_from("<16sIIdBH", packed) == (b"sixteen bytes id", 32, 48, 90_000.0, 1, 8)
    assert packed[35:] == b"afxb\x2c\x01mo" + b"\x00" * 48


def test_the_two_scripts_have_names_of_their_own() -> None:
    assert APPLY_EVENTS.sha != WRITE_RINGS.sha
    assert len(APPLY_EVENTS.sha) == 40


def test_a_clusters_information_is_added_up() -> None:
    one = {"valkey_version": "9.1.2", "used_memory": 10, "db0": {"keys": 3, "expires": 1}}
    assert StoreInfo.of(one) == StoreInfo("9.1.2", 10, 3, 1)
    assert StoreInfo.of({"a": one, "b": {**one, "used_memory": 5}}) == StoreInfo("9.1.2", 15, 6, 2)
