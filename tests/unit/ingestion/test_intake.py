"""Files into the event log: what is right at once, what isn't with its reason, again without effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliostat.clock import ManualClock, parse_instant_us
from heliostat.errors import SchemaMismatchError, TooManyEventsError, UnknownSourceError
from heliostat.features.categories import CategoryDictionary
from heliostat.features.definitions import Entity, EventSource
from heliostat.ingestion.intake import Intake, ingest_files
from heliostat.schema import INGESTED, TIMESTAMP
from heliostat.settings import ClockSettings, IngestionSettings, Settings
from heliostat.storage.catalog import Catalog
from heliostat.storage.event_log import EventLog
from heliostat.storage.offline_store import OfflineStore
from heliostat.storage.online_store import OnlineConfig, OnlineStore
from heliostat.workspace import Workspace

NOW_US = parse_instant_us("2020-06-01")
USER = Entity("user", keys={"user_id": "int64"})
SALES = EventSource(
    "sales",
    schema=pa.schema([("user_id", pa.int64()), ("event_id", pa.string()), ("at", TIMESTAMP)]),
    entity=USER,
    event_time="at",
    event_id="event_id",
)
CSV = "user_id,event_id,at\n"


@dataclass
class Stores:
    """The parts of a workspace that ingestion needs; real ones, in a folder."""

    clock: ManualClock
    configured: Settings
    event_log: EventLog
    offline_store: OfflineStore
    categories: CategoryDictionary


@pytest.fixture
def stores(tmp_path: Path) -> Stores:
    root = str(tmp_path / "data")
    settings = Settings(ingestion=IngestionSettings(batch_rows=2))
    clock = ManualClock(NOW_US)
    categories = CategoryDictionary(lambda: Catalog.open(f"sqlite:///{tmp_path}/catalog.db"), [], clock)
    return Stores(clock, settings, EventLog(root, n_buckets=2), OfflineStore(root), categories)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(*lines: str, name: str = "events.csv") -> Path:
        file = tmp_path / "in" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(CSV + "".join(f"{line}\n" for line in lines))
        return file

    return written


def test_right_rows_are_taken_and_wrong_ones_kept_with_file_row_and_reason(
    stores: Stores, write: Callable[..., Path]
) -> None:
    file = write("1,a,2020-01-01", ",b,2020-01-01", "2,c,soon", "3", "4,d,2020-01-02T03:00:00Z")
    report = ingest_files([file], SALES, workspace=stores)
    assert (report.rows, report.accepted, report.duplicates, report.rejected) == (5, 2, 0, 3)
    found = stores.event_log.read(SALES, USER).sort_by("event_id")
    assert found.column("event_id").to_pylist() == ["a", "d"]
    assert found.column(INGESTED).to_pylist() == [NOW_US, NOW_US]
    letters = stores.offline_store.read_dead_letters("sales").sort_by("row").to_pylist()
    assert [(each["row"], each["reason"]) for each in letters] == [
        (1, "user_id is missing"),
        (2, "at is 'soon', which is no timestamp[us, tz=UTC]"),
        (3, "it has 1 cells, and the header 3"),
    ]
    assert {each["file"] for each in letters} == {str(file)}
    assert '"event_id": "b"' in letters[0]["event"]


def test_repetition_changes_nothing(stores: Stores, write: Callable[..., Path]) -> None:
    file = write("1,a,2020-01-01", ",b,2020-01-01")
    first = ingest_files([file], SALES, workspace=stores)
    stores.clock.advance(1)
    again = ingest_files([file, file.parent], SALES, workspace=stores)
    assert (again.accepted, again.duplicates, again.rejected) == (0, 1, 1)
    assert again.versions == first.versions
    assert stores.offline_store.read_dead_letters("sales").num_rows == 1


def test_id_in_two_files_is_one_event(stores: Stores, write: Callable[..., Path]) -> None:
    files = [write("1,a,2020-01-01", "1,b,2020-01-01"), write("1,b,2020-01-01", "1,c,2020-01-01", name="more.csv")]
    report = ingest_files(files, SALES, workspace=stores)
    assert (report.files, report.accepted, report.duplicates) == (2, 3, 1)
    assert stores.event_log.version(SALES, USER) == 1, "one commit for all files"


def test_file_with_a_wrong_schema_stops_all_before_anything_is_taken(
    stores: Stores, write: Callable[..., Path], tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.parquet"
    pq.write_table(pa.table({"user_id": [1]}), wrong)
    with pytest.raises(SchemaMismatchError, match=r"wrong\.parquet"):
        ingest_files([write("1,a,2020-01-01"), wrong], SALES, workspace=stores)
    assert stores.event_log.read(SALES, USER).num_rows == 0


def test_file_of_which_nothing_fits_is_reported_as_such(stores: Stores, write: Callable[..., Path]) -> None:
    report = ingest_files([write("x,a,2020-01-01", "1,b,2030-01-01")], SALES, workspace=stores)
    assert report.nothing_fits
    assert report.accepted == 0
    assert not ingest_files([write()], SALES, workspace=stores).nothing_fits


def test_files_need_no_online_store_and_start_none(tmp_path: Path, write: Callable[..., Path]) -> None:
    settings = Settings(home=tmp_path / "home", clock=ClockSettings(kind="replay", replay_from="2020-06-01"))
    with Workspace.open(settings) as workspace:
        assert ingest_files([write("1,a,2020-01-01")], SALES, workspace=workspace).accepted == 1
    assert sorted(each.name for each in settings.home.iterdir()) == ["clock.json", "data"]


def test_report_says_how_many_and_why(stores: Stores, write: Callable[..., Path]) -> None:
    report = ingest_files([write("1,a,2020-01-01", ",b,2020-01-01", ",c,2020-01-01")], SALES, workspace=stores)
    assert str(report).splitlines()[0].startswith("sales: 1 new events, 0 known already, 2 rejected, from 1 files in")
    assert str(report).splitlines()[1] == "  2 x user_id is missing"
    document = report.to_document()
    assert document["reasons"] == {"user_id is missing": 2}
    assert document["versions"] == {"user": 1}


@pytest.fixture
def intake() -> Intake:
    # Nothing is sent before the first command, so no server is needed to be refused.
    online = OnlineStore(OnlineConfig(url="redis://localhost:1", project="p"))
    settings = IngestionSettings(max_events_per_request=2)
    return Intake(online, [SALES], [], clock=ManualClock(NOW_US), settings=settings, n_buckets=2)


def test_live_events_of_an_unknown_source_are_refused(intake: Intake) -> None:
    with pytest.raises(UnknownSourceError, match="declared are: sales"):
        intake.submit("sails", [])


def test_too_many_live_events_are_refused(intake: Intake) -> None:
    with pytest.raises(TooManyEventsError, match=r"carries 3 events.*max_events_per_request") as caught:
        intake.submit("sales", [{}, {}, {}])
    assert caught.value.http_status == 413


def test_live_events_that_are_all_wrong_need_no_server(intake: Intake) -> None:
    first, second = intake.submit("sales", [{"event_id": "a"}, 5])
    assert (first.event_id, first.status, first.reason) == ("a", "rejected", "user_id is missing")
    assert second.to_document() == {
        "event_id": None,
        "status": "rejected",
        "reason": "it is 5, not an object with the event's columns",
    }


def test_intake_is_used_as_its_store_wants(intake: Intake) -> None:
    with pytest.raises(TypeError, match="use submit"):
        intake.asubmit("sales", []).send(None)
