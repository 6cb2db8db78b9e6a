"""Bad input of many kinds, at every door: each gives the documented code and names the fix."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.churn.cdnow import write_parquet
from heliostat import cli
from heliostat.settings import Settings


@dataclass(frozen=True)
class Outcome:
    code: int
    said: str


Shell = Callable[..., Outcome]


@pytest.fixture
def heliostat(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """The command line on a project of this test's own, in this process."""
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str | Path, **variables: str) -> Outcome:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["heliostat", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), " ".join((printed.err + printed.out).split()))

    return run


@pytest.fixture
def definitions(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a definitions module and gives its name."""
    monkeypatch.syspath_prepend(str(home))

    def write(code: str) -> str:
        name = f"definitions_{abs(hash(code))}"
        (home / f"{name}.py").write_text(code)
        return name

    return write


VIEW = """
import pyarrow as pa
from heliostat import Count, Entity, EventSource, FeatureView, Sum
user = Entity("user", keys={"user_id": "int64"})
schema = pa.schema({"id": pa.string(), "user_id": pa.int64(), "at": pa.timestamp("us"), "amount": pa.float64()})
clicks = EventSource("clicks", schema=schema, entity=user, event_time="at", event_id="id")
view = FeatureView("facts", version=1, source=clicks, features={"x": %s})
"""


def test_a_missing_events_file(heliostat: Shell) -> None:
    outcome = heliostat("ingest", "nowhere.parquet", "--source", "purchases")
    assert outcome.code == 3
    assert "nowhere.parquet" in outcome.said
    assert "check the path" in outcome.said


def test_a_file_that_is_no_parquet(heliostat: Shell, home: Path) -> None:
    (home / "a.parquet").write_bytes(b"this is no parquet")
    outcome = heliostat("ingest", home / "a.parquet", "--source", "purchases")
    assert outcome.code == 3
    assert "a.parquet" in outcome.said


def test_a_file_of_an_unknown_kind(heliostat: Shell, home: Path) -> None:
    (home / "a.xlsx").write_bytes(b"x")
    outcome = heliostat("ingest", home / "a.xlsx", "--source", "purchases")
    assert outcome.code == 3
    assert "parquet" in outcome.said.lower()


def test_a_file_with_the_wrong_schema(heliostat: Shell, home: Path) -> None:
    pq.write_table(pa.table({"event_id": [1], "customer": [1]}), home / "a.parquet")
    outcome = heliostat("ingest", home / "a.parquet", "--source", "purchases")
    assert outcome.code == 3
    assert "'customer_id' is missing" in outcome.said
    assert "Expected: event_id: int64" in outcome.said


def test_a_column_of_the_wrong_type(heliostat: Shell, home: Path) -> None:
    columns = {
        "event_id": [1],
        "customer_id": [1],
        "purchased_at": ["1998-01-01"],
        "quantity": ["two"],
        "amount": [1.0],
    }
    pq.write_table(pa.table(columns), home / "a.parquet")
    outcome = heliostat("ingest", home / "a.parquet", "--source", "purchases")
    assert outcome.code == 3
    assert "quantity is 'two', which is no int64" in outcome.said


def test_an_unknown_source(heliostat: Shell, home: Path) -> None:
    write_parquet(home / "a.parquet")
    outcome = heliostat("ingest", home / "a.parquet", "--source", "clicks")
    assert outcome.code == 4
    assert "declared are: purchases" in outcome.said


def test_a_mistyped_setting_in_a_file(heliostat: Shell, home: Path) -> None:
    (home / "s.yaml").write_text("serving: {prot: 1}")
    outcome = heliostat("status", "--config", home / "s.yaml")
    assert outcome.code == 2
    assert "serving.port" in outcome.said


def test_a_mistyped_setting_in_the_environment(heliostat: Shell) -> None:
    outcome = heliostat("status", HELIOSTAT_PROJEKT="x")
    assert outcome.code == 2
    assert "HELIOSTAT_PROJECT" in outcome.said


def test_a_settings_file_that_does_not_exist(heliostat: Shell) -> None:
    outcome = heliostat("status", "--config", "nowhere.yaml")
    assert outcome.code == 3
    assert "--config" in outcome.said


def test_a_definitions_module_that_does_not_exist(heliostat: Shell) -> None:
    outcome = heliostat("apply", HELIOSTAT_DEFINITIONS="configs.nowhere.definitions")
    assert outcome.code == 3
    assert "`definitions`" in outcome.said


def test_a_definition_of_an_unknown_column(heliostat: Shell, definitions: Callable[[str], str]) -> None:
    module = definitions(VIEW % 'Sum("amuont", window="1d")')
    outcome = heliostat("apply", HELIOSTAT_DEFINITIONS=module)
    assert outcome.code == 2
    assert "'amuont'" in outcome.said
    assert "there are: id, user_id, at, amount" in outcome.said


def test_a_definition_of_a_bad_window(heliostat: Shell, definitions: Callable[[str], str]) -> None:
    outcome = heliostat("apply", HELIOSTAT_DEFINITIONS=definitions(VIEW % 'Count(window="a month")'))
    assert outcome.code == 2
    assert "30d" in outcome.said


def test_a_definitions_module_that_is_no_python(heliostat: Shell, definitions: Callable[[str], str]) -> None:
    outcome = heliostat("apply", HELIOSTAT_DEFINITIONS=definitions("this is (no python"))
    assert outcome.code == 2
    assert "line 1" in outcome.said


def test_a_changed_definition_under_the_old_version(heliostat: Shell, definitions: Callable[[str], str]) -> None:
    first, second = definitions(VIEW % 'Count(window="1d")'), definitions(VIEW % 'Count(window="2d")')
    assert heliostat("apply", HELIOSTAT_DEFINITIONS=first).code == 0
    outcome = heliostat("apply", HELIOSTAT_DEFINITIONS=second)
    assert outcome.code == 2
    assert "'1d'" in outcome.said
    assert "'2d'" in outcome.said
    assert "Raise its version to 2" in outcome.said


def test_an_unknown_view(heliostat: Shell) -> None:
    outcome = heliostat("features", "get", "nothing", "1")
    assert outcome.code == 4
    assert "recent_purchases@1" in outcome.said


def test_an_entity_key_of_the_wrong_type(heliostat: Shell) -> None:
    outcome = heliostat("features", "get", "recent_purchases", "somebody")
    assert outcome.code == 3
    assert "an integer" in outcome.said


def test_an_unknown_entity_is_absent_and_no_error(heliostat: Shell) -> None:
    outcome = heliostat("features", "get", "recent_purchases", "999999999", "--json")
    assert outcome.code == 0
    assert '"absent": true' in outcome.said


def test_an_unknown_model(heliostat: Shell) -> None:
    outcome = heliostat("models", "show", "fraud")
    assert outcome.code == 4
    assert "no model 'fraud'" in outcome.said


def test_promoting_a_version_that_does_not_exist(heliostat: Shell) -> None:
    assert heliostat("models", "promote", "churn", "3").code == 4


def test_a_prediction_when_nothing_serves(heliostat: Shell) -> None:
    outcome = heliostat("predict", "1", HELIOSTAT_SERVING__PORT="1")
    assert outcome.code == 6
    assert "heliostat up" in outcome.said


def test_an_online_store_that_does_not_answer(heliostat: Shell) -> None:
    outcome = heliostat("features", "get", "recent_purchases", "1", HELIOSTAT_ONLINE__URL="redis://127.0.0.1:1/0")
    assert outcome.code == 6
    assert "online.url" in outcome.said


def test_a_catalog_that_cannot_be_opened(heliostat: Shell, home: Path) -> None:
    (home / "file").write_text("no folder")
    outcome = heliostat("models", "list", HELIOSTAT_CATALOG__URL=f"sqlite:///{home}/file/catalog.db")
    assert outcome.code == 6
    assert "catalog.url" in outcome.said


def test_an_unknown_option_and_an_unknown_command(heliostat: Shell) -> None:
    assert heliostat("status", "--verbos").code == 2
    assert heliostat("statsu").code == 2


def test_events_from_the_future_and_without_keys_are_kept_as_dead_letters(heliostat: Shell, home: Path) -> None:
    columns = {
        "event_id": [1, 2, 3],
        "customer_id": [1, None, 3],
        "purchased_at": ["1998-06-01T00:00:00", "1998-06-01T00:00:00", "1999-01-01T00:00:00"],
        "quantity": [1, 1, 1],
        "amount": [1.0, 1.0, 1.0],
    }
    pq.write_table(pa.table(columns), home / "a.parquet")
    outcome = heliostat("ingest", home / "a.parquet", "--source", "purchases", "--json")
    assert outcome.code == 0
    assert '"accepted": 1' in outcome.said
    assert '"rejected": 2' in outcome.said
    assert "by more than 1m" in outcome.said
    assert "customer_id is missing" in outcome.said


@pytest.mark.parametrize(
    ("job", "arguments", "code", "says"),
    [
        ("train_model", ["--model", "fraud"], 4, "known are: churn"),
        ("train_model", ["--instants", "soon"], 3, "1998-07-01"),
        ("train_model", ["--trials", "-1"], 2, "--trials"),
        ("materialize_features", ["--view", "nothing"], 4, "recent_purchases@1"),
        ("materialize_features", ["--as-of", "2001-01-01"], 3, "up to now"),
        ("batch_predict", ["--model", "fraud"], 4, "known are: churn"),
        ("batch_predict", ["--model", "churn"], 4, "churn"),
        ("monitor_model", ["--check", "vibes"], 3, "drift"),
        ("retrain_model", ["--model", "fraud"], 4, "known are: churn"),
        ("compute_features", ["--view", "nothing", "--day", "1998-01-01"], 4, "recent_purchases@1"),
        ("ingest_events", ["nowhere.csv", "--source", "purchases"], 3, "nowhere.csv"),
        ("sink_streams", ["--interval", "0"], 2, "--interval"),
    ],
)
def test_a_job_refuses_what_it_cannot_do(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job: str,
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [job, *arguments])
    monkeypatch.setattr("heliostat.cluster.connect", lambda _: contextlib.nullcontext())
    with pytest.raises(SystemExit) as ended:
        cli.run_job(importlib.import_module(f"jobs.{job}").main)
    said = " ".join("".join(capsys.readouterr()).split())
    assert ended.value.code == code, said
    assert says in said
