"""A project of benchmarks/chaos.py for tests: its versions are registered, and its graph is taken away at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks import chaos, chaos_load
from benchmarks.chaos_load import Truth
from deployments import graph
from heliostat.settings import ClockSettings, ServingSettings, Settings
from heliostat.storage.embedded import EmbeddedServer
from heliostat.workspace import Workspace

_DEADLINE_MS = 3_000.0


@contextlib.contextmanager
def chaos_project(home: Path) -> Iterator[tuple[Workspace, Truth]]:
    """The project, and what its versions say, while the block runs; it is named as its home is."""
    bare = Settings(
        project=home.name,
        home=home,
        clock=ClockSettings(kind="replay", replay_from="1998-07-01", speed=0.0),
        serving=ServingSettings(deadline_ms=_DEADLINE_MS),
    )
    try:
        with Workspace.open(chaos.settings_of(bare)) as workspace:
            yield workspace, chaos_load.prepare(workspace)
            graph.undeploy()
    finally:
        EmbeddedServer.stop(home)
