from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from heliostat import cluster, rebuild
from heliostat.online.bucket_rings import BucketState
from heliostat.online.materialize import SMALL_MATERIALIZATION, SMALL_WITHOUT_RAY, Materialization, Step
from heliostat.rebuild import Rebuilt, materialize_views, shown
from heliostat.settings import OnlineSettings, Settings
from heliostat.storage.ring_writes import RingCounts
from heliostat.workspace import Workspace

DONE = Materialization(("a@1",), 0, 3, 4, 1, 500, 90, RingCounts(80, 5, 0, 0, 5), 1000, 2.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_line_for_each_tenth_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with shown(stream) as step:
        for done in range(101):
            step(Step(("a@1", "b@1"), done, 100, 10 * done))
        step(Step(("c@1",), 0, 0, 0))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 12
    assert lines[1] == "a@1, b@1: 10 of 100 buckets, 100 entities"
    assert lines[-1] == "c@1: 0 of 0 buckets, 0 entities"


def test_progress_is_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with shown(stream) as step:
        step(Step(("a@1",), 0, 2, 0))
        step(Step(("a@1",), 2, 2, 1234))
    assert "2/2" in stream.getvalue()
    assert "1,234 entities" in stream.getvalue()


def test_what_was_materialized_is_told_in_a_line() -> None:
    assert str(DONE) == (
        "a@1: 500 events of 90 entities, as of 1970-01-01T00:00:00Z; rings: 80 written, 5 unchanged, 5 cleared; "
        "4 buckets in 2.0 s, 45 entities/s"
    )
    assert DONE.describe()["entities_per_s"] == 45


def test_a_rebuild_says_what_it_cant_bring_back() -> None:
    told = str(Rebuilt((DONE,), ("churn",), 7, 2))
    assert "routes: churn" in told
    assert told.splitlines()[-1].startswith(
        "events, predictions and labels that were only in the lost server's streams"
    )


def test_a_state_that_cant_be_read_is_none_at_all() -> None:
    state = BucketState("layout", 4, 5, 6, ("a", "b"))
    assert BucketState.of(state.to_bytes()) == state
    assert BucketState.of(None) is None
    assert BucketState.of(b"{") is None
    assert BucketState.of(b'{"version": 1}') is None


@pytest.mark.parametrize(("given", "small"), [(True, SMALL_MATERIALIZATION), (False, SMALL_WITHOUT_RAY)])
def test_a_ray_that_would_have_to_be_started_is_worth_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool, small: int
) -> None:
    asked: list[dict[str, Any]] = []
    joined: list[Settings] = []

    def materialize(_: Any, **options: Any) -> tuple[()]:
        asked.append(options)
        return ()

    monkeypatch.setattr(rebuild, "materialize", materialize)
    monkeypatch.setattr(cluster, "is_given", lambda _: given)
    monkeypatch.setattr(cluster, "connect", lambda settings: joined.append(settings) or contextlib.nullcontext())
    settings = Settings(home=tmp_path, online=OnlineSettings(url="redis://127.0.0.1:1"))
    materialize_views(Workspace(settings), [])
    assert [(each["small"], each["on_ray"]) for each in asked] == [(small, True)]
    assert len(joined) == given, "one that is there says first of all whether its machines share the storage"
