"""The dictionary of categories: append-only, the same for whoever asks, and no place for collisions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sqlalchemy.exc import DBAPIError

from heliostat.clock import ManualClock, parse_instant_us
from heliostat.errors import CatalogUnavailableError, CategoryCollisionError
from heliostat.features.aggregations import Count, Last
from heliostat.features.categories import CategoryDictionary
from heliostat.features.definitions import Entity, EventSource, FeatureView
from heliostat.schema import TIMESTAMP, text_code, text_codes
from heliostat.storage.catalog import Catalog
from heliostat.storage.catalog_tables import metadata
from heliostat.storage.event_log import EventLog

user = Entity("user", keys={"user_id": "int64"})
visits = EventSource(
    "visits",
    schema=pa.schema(
        {"id": pa.int64(), "user_id": pa.int64(), "at": TIMESTAMP, "country": pa.string(), "agent": pa.string()}
    ),
    entity=user,
    event_time="at",
    event_id="id",
)
places = FeatureView("places", version=1, source=visits, features={"n": Count(), "country": Last("country")})
CLOCK = ManualClock(parse_instant_us("2024-06-01"))


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.open(f"sqlite:///{tmp_path}/catalog.db") as opened:
        yield opened


def dictionary(catalog: Catalog) -> CategoryDictionary:
    """As another process would open it."""
    return CategoryDictionary(lambda: catalog, [places], CLOCK)


def events(*countries: str | None) -> pa.Table:
    n = len(countries)
    columns = [range(n), [1] * n, pa.array([0] * n).cast(TIMESTAMP), countries, ["agent"] * n]
    return pa.table(columns, schema=visits.schema)


def learn(words: CategoryDictionary, *countries: str | None) -> int:
    return words.learn("visits", words.unknown("visits", events(*countries)))


def test_texts_of_categorical_columns_are_learned_once_and_told_to_everybody(catalog: Catalog) -> None:
    first, second = dictionary(catalog), dictionary(catalog)
    assert learn(first, "NL", "DE", None, "NL") == 2
    assert first.unknown("visits", events("DE", None)) == {}
    assert learn(second, "DE", "FR") == 1
    codes = np.array([text_code("FR"), np.nan, text_code("NL"), text_code("nowhere")])
    for words in (first, second, dictionary(catalog)):
        assert words.texts(places, "country", codes) == ["FR", None, "NL", None]
    assert first.columns == {"visits": ("country",)}, "other columns of texts aren't its business"


def test_two_texts_with_one_code_are_refused_whoever_saw_the_first(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn(dictionary(catalog), "NL")
    monkeypatch.setattr(
        "heliostat.features.categories.text_codes", lambda texts: np.full(len(texts), text_code("NL"))
    )
    words = dictionary(catalog)
    with pytest.raises(CategoryCollisionError, match="visits.country: 'DE' and 'NL'"):
        learn(words, "DE")
    with pytest.raises(CategoryCollisionError):
        words.unknown("visits", events("FR", "BE"))
    monkeypatch.undo()
    assert dictionary(catalog).texts(places, "country", text_codes(pa.array(["NL", "DE"]))) == ["NL", None]


@pytest.mark.parametrize("statement", ["UPDATE categories SET text = 'x'", "DELETE FROM categories"])
def test_the_database_itself_keeps_what_was_learned(catalog: Catalog, statement: str) -> None:
    learn(dictionary(catalog), "NL")
    with pytest.raises((DBAPIError, CatalogUnavailableError)), catalog.write() as rows:
        rows._connection.exec_driver_sql(statement)
    assert dictionary(catalog).texts(places, "country", np.array([text_code("NL")])) == ["NL"]


def test_thousands_of_texts_are_learned_and_told(catalog: Catalog) -> None:
    texts = [f"town {each}" for each in range(3_000)]
    assert learn(dictionary(catalog), *texts) == 3_000
    assert dictionary(catalog).texts(places, "country", text_codes(pa.array(texts))) == texts


def test_a_view_over_old_events_catches_up_with_their_texts(catalog: Catalog, tmp_path: Path) -> None:
    log = EventLog(str(tmp_path / "log"), {}, 3)
    with log.bulk(visits, ingested_us=CLOCK.now_us()) as bulk:
        bulk.add(events("NL", None, "DE", "NL", "FR"))
        bulk.commit()
    words = dictionary(catalog)
    assert words.catch_up(log, places) == 3
    assert words.texts(places, "country", text_codes(pa.array(["FR", "DE"]))) == ["FR", "DE"]
    assert dictionary(catalog).catch_up(log, places) == 0, "who knows something knew it from intake on"
    plain = FeatureView("plain", version=1, source=visits, features={"n": Count()})
    assert CategoryDictionary(lambda: pytest.fail("not asked"), [plain], CLOCK).catch_up(log, plain) == 0


def test_texts_that_a_file_holds_as_a_dictionary_have_the_same_codes() -> None:
    texts = pa.chunked_array([["b", None], ["a", "b"]])
    encoded = pa.chunked_array([chunk.dictionary_encode() for chunk in texts.chunks])
    np.testing.assert_array_equal(text_codes(encoded), text_codes(texts))


def test_a_catalog_of_an_earlier_release_gains_the_table(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/catalog.db"
    with Catalog.open(url) as old, old.write() as rows:
        rows._connection.exec_driver_sql("DROP TABLE categories")
    with Catalog.open(url) as opened:
        assert learn(dictionary(opened), "NL") == 1
    assert "categories" in metadata.tables
