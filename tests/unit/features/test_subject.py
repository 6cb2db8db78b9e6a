from __future__ import annotations

import json

import pyarrow as pa
import pytest

from heliostat.errors import InvalidValueError
from heliostat.features.definitions import Entity
from heliostat.features.subject import Subject, rows_by_text

USER = Entity("user", keys={"user_id": "int64"})
GUEST = Entity("guest", keys={"user_id": "int64"})
DEVICE = Entity("device", keys={"user_id": "int64", "device": "string"})
SHOP = Entity("shop", keys={"shop": "string"})


def test_a_text_means_the_entity_itself_or_one_that_has_it_as_a_part() -> None:
    seven = Subject(USER, "7")
    assert seven.is_meant(USER, "7")
    assert seven.is_meant(DEVICE, "7|phone")
    assert not seven.is_meant(USER, "17")
    assert not seven.is_meant(DEVICE, "17|7")
    assert not seven.is_meant(SHOP, "7"), "a shop of the same name is another one"
    assert not seven.is_meant(GUEST, "7"), "and so is who has a key of the same column"
    assert seven.is_meant(None, "7"), "whose key it was, nobody knows any more"
    assert not seven.is_meant(DEVICE, "no key of a device")


def test_a_part_of_a_key_does_not_mean_the_whole() -> None:
    phone = Subject(DEVICE, "7|phone")
    assert phone.is_meant(DEVICE, "7|phone")
    assert not phone.is_meant(USER, "7")
    assert not phone.is_meant(DEVICE, "7|tablet")


def test_columns_are_its_key_unless_they_are_another_entitys() -> None:
    seven = Subject(USER, "7")
    assert seven.has_columns((USER, SHOP), ["user_id", "amount"])
    assert seven.has_columns((DEVICE,), ["user_id", "device"])
    assert seven.has_columns((), ["user_id"])
    assert not seven.has_columns((GUEST,), ["user_id"])
    assert not seven.has_columns((USER,), ["shop"])


def test_rows_are_told_by_their_key_columns_and_null_is_nobody() -> None:
    phone = Subject(DEVICE, "7|phone")
    rows = pa.table({"user_id": [7, 7, None, 8], "device": ["phone", "tablet", "phone", "phone"]})
    assert phone.rows(rows).tolist() == [True, False, False, False]
    assert Subject(USER, "7").rows(pa.table({"user_id": ["no", "number"]})).tolist() == [False, False]


def test_rows_are_told_by_a_text_column() -> None:
    rows = pa.table({"entity": pa.array(["7", None, "8", "7"])})
    assert rows_by_text(rows, column="entity", meant=lambda text: text == "7").tolist() == [True, False, False, True]
    nothing = pa.table({"entity": pa.array([None, None], pa.string())})
    assert rows_by_text(nothing, column="entity", meant=lambda _: True).tolist() == [False, False]


@pytest.mark.parametrize(
    ("event", "found"),
    [
        (json.dumps({"user_id": 7, "at": None}), True),
        (json.dumps({"user_id": "7"}), True),
        (json.dumps({"user_id": 7.0}), True),
        (json.dumps({"user_id": 8, "amount": 7}), False),
        (json.dumps({"usr_id": 7}), True),
        (json.dumps({"usr_id": 17}), False),
        ("7,2020-01-01", True),
        ("77,2020-01-01", False),
        ("[7]", True),
    ],
)
def test_a_rejected_event_is_told_by_its_columns_or_else_by_its_whole_text(event: str, found: bool) -> None:
    assert Subject(USER, "7").is_in_letter(event) is found


def test_a_text_that_is_no_key_is_refused() -> None:
    with pytest.raises(InvalidValueError):
        Subject(USER, "seven")
