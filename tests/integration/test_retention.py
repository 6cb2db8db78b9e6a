"""Old days leave the log, unless somebody looks back at them; erasure and retention from the command line."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from heliostat import cli
from heliostat.clock import US_PER_DAY, parse_instant_us
from heliostat.errors import HistoryNeededError, SettingsError
from heliostat.retention import PRUNE_KIND, needs, prune
from heliostat.settings import ClockSettings, OnlineSettings, Settings, StorageSettings, TrainingSettings
from heliostat.workspace import Workspace
from tests.integration.erasure_declarations import SALES, SHOP, USER

ROOT = Path(__file__).parents[2]
NOW_US = parse_instant_us("2026-03-01T15:00:00Z")


def settings_of(home: Path, **more: Any) -> Settings:
    """Nothing here may touch the online store: this address answers nobody."""
    return Settings(
        project=f"r{home.name}",
        home=home,
        definitions="tests.integration.erasure_declarations",
        online=OnlineSettings(url=f"unix://{home}/nobody.sock"),
        clock=ClockSettings(kind="replay", replay_from="2026-03-01T15:00:00Z", speed=0),
        **more,
    )


@pytest.fixture
def workspace(home: Path) -> Iterator[Workspace]:
    with Workspace.open(settings_of(home)) as opened:
        fill(opened)
        yield opened


def fill(workspace: Workspace) -> None:
    """An event a day over 60 days, in two files; days are counted back from now."""
    for days in (range(30, 60), range(30)):
        rows = [
            {
                "event_id": f"e{day}", "user": f"u{day % 3}", "shop": "s", "device": "d",
                "at": NOW_US - day * US_PER_DAY, "amount": 1.0,
            }
            for day in days
        ]  # fmt: skip
        workspace.event_log.append(SALES, pa.Table.from_pylist(rows, SALES.schema), ingested_us=NOW_US)


def days_left(workspace: Workspace) -> list[int]:
    return sorted(int(each[1:]) for each in workspace.event_log.read(SALES, USER).column("event_id").to_pylist())


def test_whole_days_go_by_event_time_from_every_entitys_table(workspace: Workspace) -> None:
    report = prune(workspace, keep_us=20 * US_PER_DAY, force=True)
    # Twenty days before now is the afternoon of a day, which stays whole.
    assert days_left(workspace) == list(range(21))
    assert workspace.event_log.read(SALES, SHOP).num_rows == 21
    assert dict(report.rows) == {"sales": 39}
    assert report.before_us % US_PER_DAY == 0


def test_pruning_again_changes_nothing_and_a_late_old_event_goes_the_next_time(workspace: Workspace) -> None:
    prune(workspace, keep_us=20 * US_PER_DAY, force=True)
    version = workspace.event_log.version(SALES, USER)
    assert dict(prune(workspace, keep_us=20 * US_PER_DAY, force=True).rows) == {"sales": 0}
    assert workspace.event_log.version(SALES, USER) == version
    late = {"event_id": "e50", "user": "u", "shop": "s", "device": "d", "at": NOW_US - 50 * US_PER_DAY}
    workspace.event_log.append(SALES, pa.Table.from_pylist([late], SALES.schema), ingested_us=NOW_US)
    assert 50 in days_left(workspace)
    assert dict(prune(workspace, keep_us=20 * US_PER_DAY, force=True).rows) == {"sales": 1}


def test_files_of_old_days_alone_are_taken_out_without_being_read(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a file of old days was read")

    place = workspace.event_log.table(SALES, USER)
    monkeypatch.setattr(type(place), "read", refuse)
    # Exactly the days of the older files: no file straddles the edge.
    report = prune(workspace, keep_us=29 * US_PER_DAY, force=True)
    monkeypatch.undo()
    assert dict(report.rows) == {"sales": 30}
    assert days_left(workspace) == list(range(30))


def test_events_that_are_still_needed_are_refused_and_told_by_whom(workspace: Workspace) -> None:
    with pytest.raises(HistoryNeededError) as refused:
        prune(workspace, keep_us=20 * US_PER_DAY)
    told = str(refused.value)
    assert "events of 'sales' before 2026-02-09 are still needed" in told
    assert "feature view user_sales@1 needs all of them" in told
    assert "feature view device_sales@1 needs those since 2026-01-30" in told
    assert days_left(workspace) == list(range(60)), "nothing has changed"


def test_training_instants_and_what_monitors_look_at_reach_further_back(home: Path) -> None:
    training = TrainingSettings(instants=("2026-02-01",), validation_instants=("2026-02-20",))
    with Workspace.open(settings_of(home, training=training)) as workspace:
        found = {need.who: need.since_us for need in needs(workspace, SALES)}
    day = parse_instant_us("2026-01-30")
    assert found["feature view device_sales@1"] == day
    assert found["feature view user_sales@1"] is None, "it has a lifetime feature"
    assert found["the parity check of user_sales@1 (monitoring.window)"] is None
    assert "the parity check of shop_sales@1 (monitoring.window)" not in found, "no model looks at it"
    assert found["training 'churn' at 2026-02-01T00:00:00Z"] is None, "its population is whoever ever came"


def test_dry_run_counts_and_names_who_would_be_overruled(workspace: Workspace) -> None:
    report = prune(workspace, keep_us=20 * US_PER_DAY, dry_run=True)
    assert dict(report.rows) == {"sales": 39}
    assert any("user_sales@1" in each for each in report.overruled)
    assert days_left(workspace) == list(range(60))
    with workspace.catalog.read() as rows:
        assert rows.runs(PRUNE_KIND) == ()


def test_without_a_retention_nothing_is_ever_dropped(workspace: Workspace) -> None:
    with pytest.raises(SettingsError, match="storage.retention: it isn't set"):
        prune(workspace)


def test_replaced_files_stay_for_a_while_for_whoever_reads_them(home: Path) -> None:
    storage = StorageSettings(retention="20d", vacuum_after="1d")
    with Workspace.open(settings_of(home, storage=storage)) as workspace:
        fill(workspace)
        before = workspace.event_log.version(SALES, USER)
        assert prune(workspace, force=True).vacuumed == 0
        assert workspace.event_log.read(SALES, USER, version=before).num_rows == 60
        at_once = workspace.configured.model_copy(update={"storage": StorageSettings(vacuum_after=None)})
    with Workspace.open(at_once) as workspace:
        assert prune(workspace, keep_us=20 * US_PER_DAY, force=True).vacuumed > 0


# ── The commands ────────────────────────────────────────────────────────────────────


@dataclass
class Outcome:
    """How a command ended, and what it said."""

    code: int
    output: str
    error: str


Shell = Callable[..., Outcome]


@pytest.fixture
def heliostat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    logger = logging.getLogger("heliostat")
    before = logger.handlers, logger.level, logger.propagate
    monkeypatch.chdir(ROOT)

    def run(settings: Settings, *arguments: str) -> Outcome:
        for name, value in settings.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["heliostat", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Outcome(int(str(ended.value.code)), said.out, said.err)

    yield run
    logger.handlers, logger.level, logger.propagate = before


def test_prune_command_refuses_tells_and_does(workspace: Workspace, heliostat: Shell) -> None:
    settings = workspace.configured
    refused = heliostat(settings, "prune", "--keep", "20d")
    assert (refused.code, "still needed" in refused.error) == (5, True)
    tried = heliostat(settings, "prune", "--keep", "20d", "--dry-run")
    assert tried.code == 0, tried.error
    assert "sales: 39 events before 2026-02-09 would go" in tried.output
    done = heliostat(settings, "prune", "--keep", "20d", "--force", "--json")
    assert done.code == 0, done.error
    assert json.loads(done.output)["rows"] == {"sales": 39}
    assert days_left(workspace) == list(range(21))


def test_forget_command_erases_and_says_what_without_the_key(home: Path, valkey: str, heliostat: Shell) -> None:
    settings = settings_of(home).model_copy(update={"online": OnlineSettings(url=valkey)})
    with Workspace.open(settings) as workspace:
        fill(workspace)
        done = heliostat(settings, "forget", "user", "u1", "--json")
        assert done.code == 0, done.error
        report = json.loads(done.output)
        assert report["rows"] == {f"events/sales/{each.name}": 20 for each in SALES.entities}
        assert "u1" not in done.output
        assert "u1" not in set(workspace.event_log.read(SALES, SHOP).column("user").to_pylist())
        unknown = heliostat(settings, "forget", "buyer", "u1")
        assert unknown.code == 4
        assert "there is no entity 'buyer'; declared are: user" in unknown.error
