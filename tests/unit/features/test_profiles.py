"""Profile sources: rows that replace each other, named by entity and instant."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.clock import US_PER_DAY, ManualClock, parse_instant_us
from heliostat.errors import InvalidDefinitionError, UnknownColumnError
from heliostat.features.aggregations import Latest
from heliostat.features.categories import CategoryDictionary
from heliostat.features.definitions import Entity, EventSource, FeatureView, ProfileSource
from heliostat.features.offline import compute_features
from heliostat.ingestion.checking import EventCheck
from heliostat.ingestion.intake import ingest_files
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.schema import TIMESTAMP, text_code
from heliostat.settings import ClockSettings, Settings
from heliostat.storage.catalog import Catalog
from heliostat.storage.event_log import EventLog
from heliostat.storage.offline_store import OfflineStore
from heliostat.storage.online_store import OnlineKeys
from tests.rings import rings_of

NOW_US = parse_instant_us("2024-06-01")
KEYS, LIMITS = OnlineKeys("hs", "test"), RingLimits(US_PER_DAY, 60_000_000)

user = Entity("user", keys={"user_id": "int64"})
SCHEMA = pa.schema({"user_id": pa.int64(), "since": TIMESTAMP, "country": pa.string(), "income": pa.float64()})
profiles = ProfileSource("profiles", schema=SCHEMA, entity=user, updated_at="since")
account = FeatureView(
    "account", version=1, source=profiles, features={"country": Latest("country"), "income": Latest("income")}
)


def checked(*rows: dict[str, Any]) -> pa.Table:
    result = EventCheck(profiles, future_tolerance_us=0).check(list(rows), now_us=NOW_US)
    assert not result.reasons
    return result.accepted


def row(user_id: int, days_ago: float, country: str | None, income: float | None = 1.0) -> dict[str, Any]:
    return {"user_id": user_id, "since": NOW_US - int(days_ago * US_PER_DAY), "country": country, "income": income}


def offline(rows: pa.Table, as_of_us: int = NOW_US) -> dict[str, list[float]]:
    found = compute_features([account], rows, user.encoded(["1", "2", "3"]), np.full(3, as_of_us))
    return {name.removeprefix("account__"): values.tolist() for name, values in found.items()}


def online(rows: pa.Table) -> np.ndarray:
    rings = rings_of([account], rows, keys=KEYS, n_buckets=1, as_of_us=NOW_US, limits=LIMITS)
    reader = FeatureReader([*account], keys=KEYS, n_buckets=1, limits=LIMITS)
    return reader.decode([rings.get(key) for key in reader.keys(["1", "2", "3"])], as_of_us=NOW_US).matrix


def test_the_newest_row_before_the_instant_counts_and_its_null_is_null() -> None:
    rows = checked(row(1, 9, "NL", 5.0), row(1, 3, "DE", None), row(2, 4, "FR"), row(2, 2, None, 7.0))
    found = offline(rows)
    assert found["country"][:2] == [text_code("DE"), pytest.approx(np.nan, nan_ok=True)]
    assert found["income"][:2] == [pytest.approx(np.nan, nan_ok=True), 7.0]
    assert np.isnan(found["country"][2]), "nobody has said anything about user 3"
    before = offline(rows, NOW_US - 5 * US_PER_DAY)
    assert before["country"][0] == text_code("NL")
    assert before["income"][0] == 5.0


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 2),
            st.integers(1, 40),
            st.sampled_from(["NL", "DE", None]),
            st.sampled_from([1.0, -2.5, None]),
        ),
        max_size=12,
        unique_by=lambda each: each[:2],
    )
)
def test_rings_say_what_the_kernel_says_in_whatever_order_rows_come(picked: list[Any]) -> None:
    rows = checked(*(row(user_id, days / 2, country, income) for user_id, days, country, income in picked))
    found = offline(rows)
    np.testing.assert_array_equal(online(rows), np.column_stack([found["country"], found["income"]]))


def test_a_row_is_named_by_its_entity_and_instant() -> None:
    ids = checked(row(1, 1, "NL"), row(1, 1, "DE"), row(1, 2, "NL"), row(2, 1, "NL"))[profiles.event_id].to_pylist()
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


def test_keys_of_several_columns_never_share_an_id() -> None:
    pair = Entity("pair", keys={"a": "string", "b": "string"})
    schema = pa.schema({"a": pa.string(), "b": pa.string(), "since": TIMESTAMP})
    source = ProfileSource("pairs", schema=schema, entity=pair, updated_at="since")
    table = pa.table([["x|1", "x", ""], ["y", "1|y", "x|1|y"], pa.array([0] * 3).cast(TIMESTAMP)], schema=schema)
    assert len(set(source.identified(table)[source.event_id].to_pylist())) == 3


def test_a_row_without_key_or_instant_is_refused_for_that() -> None:
    check = EventCheck(profiles, future_tolerance_us=0)
    rows = [{**row(1, 1, "NL"), "since": None}, {**row(1, 1, "NL"), "user_id": None}]
    assert check.check(rows, now_us=NOW_US).reasons == ("since is missing", "user_id is missing")
    check.require_columns(SCHEMA, what="a file")


def test_a_profile_source_means_something_else_than_an_event_source_with_the_same_columns() -> None:
    events = EventSource(
        "profiles", schema=profiles.schema, entity=user, event_time="since", event_id=profiles.event_id
    )
    assert events.content_hash != profiles.content_hash
    assert ProfileSource("profiles", schema=SCHEMA, entity=user, updated_at="since").content_hash == (
        profiles.content_hash
    )


def test_a_profile_source_that_cant_work_says_why() -> None:
    with pytest.raises(InvalidDefinitionError, match="row_id"):
        ProfileSource("p", schema=profiles.schema, entity=user, updated_at="since")
    with pytest.raises(UnknownColumnError, match="changed_at"):
        ProfileSource("p", schema=SCHEMA, entity=user, updated_at="changed_at")


def test_files_of_rows_come_in_without_ids_and_again_without_effect(tmp_path: Path) -> None:
    clock = ManualClock(NOW_US)
    settings = Settings(home=tmp_path, clock=ClockSettings(kind="replay", replay_from="2024-06-01"))
    (tmp_path / "rows.csv").write_text(
        "user_id,since,country,income\n1,2024-01-01,NL,5\n1,2024-02-01,,6\n1,2024-01-01,DE,7\n,2024-01-01,NL,1\n"
    )
    pq.write_table(checked(row(2, 3, "FR")).select(SCHEMA.names), tmp_path / "rows.parquet")
    log = EventLog(str(tmp_path / "data"), n_buckets=2)
    words = CategoryDictionary(lambda: Catalog.open(f"sqlite:///{tmp_path}/catalog.db"), [account], clock)
    stores = SimpleNamespace(
        clock=clock,
        configured=settings,
        settings=settings,
        event_log=log,
        offline_store=OfflineStore(str(tmp_path / "data")),
        categories=words,
    )
    files = [tmp_path / "rows.csv", tmp_path / "rows.parquet"]
    report = ingest_files(files, profiles, workspace=stores)  # type: ignore[arg-type] # what it needs of a workspace
    assert (report.accepted, report.duplicates, report.rejected) == (3, 1, 1)
    assert ingest_files(files, profiles, workspace=stores).accepted == 0  # type: ignore[arg-type] # as above
    stored = pa.concat_tables([log.read_bucket(profiles, user, bucket) for bucket in range(2)])
    assert sorted(map(str, stored["country"].to_pylist())) == ["FR", "NL", "None"]
    assert np.isnan(offline(stored)["country"][0]), "the row of February says so"
