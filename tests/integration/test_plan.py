"""`heliostat plan`, `apply` and `features` on a project of one's own, as a user types them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.churn.cdnow import write_parquet
from heliostat import cli
from heliostat.settings import Settings

V1 = """
import pyarrow as pa
import pyarrow.compute as pc
from heliostat import Count, Entity, EventSource, FeatureView, Sum
customer = Entity("customer", keys={"customer_id": "int64"})
purchases = EventSource("purchases", entity=customer, event_time="purchased_at", event_id="event_id",
    schema=pa.schema(
    {"event_id": pa.int64(), "customer_id": pa.int64(), "purchased_at": pa.timestamp("us"), "amount": pa.float64()}))
spending = FeatureView("spending", version=1, source=purchases, owner="crm@example.com", tags={"team": "crm"},
    features={"spend": Sum("amount", window="30d", description="Dollars spent in a month"),
              "big": Count(where=pc.field("amount") >= 50, window="30d")})
"""
V2 = (
    V1
    + """
spending_2 = FeatureView("spending", version=2, source=purchases, features={"spend": Sum("amount", window="90d")})
"""
)
CHANGED = V1.replace('Sum("amount", window="30d"', 'Sum("amount", window="60d"')

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def heliostat(
    settings: Settings, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    """The command line on a project of this test's own, in this process: code of the definitions, then arguments."""
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.syspath_prepend(str(home))

    def run(code: str, *arguments: str | Path) -> tuple[int, str, str]:
        module = f"declared_{abs(hash(code))}"
        (home / f"{module}.py").write_text(code)
        importlib.invalidate_caches()
        monkeypatch.setenv("HELIOSTAT_DEFINITIONS", module)
        monkeypatch.setattr(sys, "argv", ["heliostat", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def _json(outcome: tuple[int, str, str]) -> Any:
    assert outcome[0] == 0, outcome[2]
    return json.loads(outcome[1])


def test_a_plan_says_what_changes_and_what_the_backfill_costs_and_changes_nothing(
    heliostat: Shell, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "purchases.parquet")
    assert heliostat(V1, "ingest", tmp_path / "purchases.parquet", "--source", "purchases")[0] == 0
    for _ in range(2):
        planned = _json(heliostat(V1, "plan", "--json"))
        assert [change["name"] for change in planned["added"]] == ["customer", "purchases", "spending"]
        (cost,) = planned["backfill"]
        assert cost["views"] == ["spending@1"]
        assert 0 < cost["events"] <= 69_659
        assert 0 < cost["entities"] < 23_570
        assert cost["bytes"] > 0
        assert cost["ring_bytes"] > 0
    assert _json(heliostat(V1, "features", "list", "--json")) == []

    assert heliostat(V1, "apply")[0] == 0
    again = _json(heliostat(V1, "plan", "--json"))
    assert (again["added"], again["backfill"], len(again["unchanged"])) == ([], [], 3)


def test_a_plan_is_read_by_people(heliostat: Shell) -> None:
    code, said, _ = heliostat(V1, "plan")
    assert code == 0
    assert "+ view spending@1" in said
    assert "backfill of spending@1: 0 events in 0 files" in said
    heliostat(V1, "apply")
    _, said, _ = heliostat(V2, "plan")
    assert "+ view spending@2, beside spending@1" in said
    assert "features.spend.window was '30d' and is '90d'" in said
    assert "3 unchanged" in said


@pytest.mark.parametrize("command", ["plan", "apply"])
def test_a_change_without_a_higher_version_is_refused_with_the_difference(heliostat: Shell, command: str) -> None:
    heliostat(V1, "apply")
    code, _, said = heliostat(CHANGED, command)
    assert code == 2
    assert "feature view spending@1" in said
    assert "features.spend.window was '30d' and is '60d'" in said
    assert "Raise its version to 2" in said
    assert _json(heliostat(V1, "plan", "--json"))["changed"] == []


def test_features_are_listed_searched_and_shown_with_their_metadata(heliostat: Shell) -> None:
    heliostat(V2, "apply")
    listed = _json(heliostat(V2, "features", "list", "--json"))
    assert [each["ref"] for each in listed] == ["spending@1__spend", "spending@1__big", "spending@2__spend"]
    (found,) = _json(heliostat(V2, "features", "search", "team:crm", "month", "--json"))
    assert found["description"] == "Dollars spent in a month"
    assert (found["source"], found["columns"]) == ("purchases", ["purchased_at", "amount"])
    assert [each["version"] for each in _json(heliostat(V2, "features", "get", "spending"))] == [2]
    assert [each["name"] for each in _json(heliostat(V2, "features", "get", "spending@1"))] == [
        "spending__spend",
        "spending__big",
    ]
    assert heliostat(V2, "features", "get", "spending@3")[0] == 4
    assert "spending@2__spend" in heliostat(V2, "features", "list")[1]
