"""What tests share: a home of one's own, one embedded server and one local Ray for the session."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from heliostat import cluster
from heliostat.settings import ClockSettings, OnlineSettings, RaySettings, Settings
from heliostat.storage.embedded import EmbeddedServer
from heliostat.storage.online_store import OnlineStore

# How quick the machine is decides no test.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

# Before any test imports Ray.
cluster.set_environment()
for _name in [name for name in os.environ if name.startswith("HELIOSTAT_") or name == "RAY_ADDRESS"]:
    del os.environ[_name]


@pytest.fixture(scope="session")
def session_home() -> Iterator[Path]:
    """A short path: unix sockets below it may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="hs-test-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def valkey(session_home: Path) -> Iterator[str]:
    """The address of a real server; tests keep apart by project name."""
    server = EmbeddedServer.ensure(session_home / "valkey-home")
    yield server.url
    server.close()


@pytest.fixture(scope="session")
def ray_local(session_home: Path) -> Iterator[None]:
    """One local Ray for all tests, with more logical CPUs than the machine has cores."""
    settings = Settings(home=session_home / "ray-home", ray=RaySettings(cpus=8, object_store_bytes=500_000_000))
    with cluster.connect(settings):
        yield


@pytest.fixture
def home(session_home: Path) -> Iterator[Path]:
    """An empty folder of this test's own."""
    folder = session_home / uuid.uuid4().hex[:8]
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def settings(home: Path, valkey: str) -> Iterator[Settings]:
    """Settings of a project of this test's own, at the end of the CDNOW log."""
    own = Settings(
        project=f"t{home.name}",
        home=home,
        # A disk that is busy with something else may hold the server up for seconds.
        online=OnlineSettings(url=valkey, timeout_s=10.0),
        clock=ClockSettings(kind="replay", replay_from="1998-07-01"),
    )
    yield own
    # A scan walks over the keys of all projects: what one test leaves makes every later one slower.
    with OnlineStore.open(own) as store:
        for chunk in store.scan(f"{store.keys.root}:"):
            store.remove(chunk)
