from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.clock import (
    US_PER_DAY,
    ManualClock,
    ReplayClock,
    format_duration,
    format_instant,
    parse_duration_us,
    parse_instant_us,
    to_datetime,
)
from heliostat.errors import InvalidValueError, WindowError


@pytest.mark.parametrize(
    ("text", "length_us"),
    [("30d", 30 * US_PER_DAY), ("12h", US_PER_DAY // 2), ("2w", 14 * US_PER_DAY), ("250ms", 250_000), ("1us", 1)],
)
def test_a_duration_is_read_in_its_unit(text: str, length_us: int) -> None:
    assert parse_duration_us(text) == length_us


@pytest.mark.parametrize("text", ["", "d", "30", "-1d", "0d", "1.5h", "30 days", "1y"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(WindowError, match="30d, 12h|longer"):
        parse_duration_us(text)


@given(st.integers(min_value=1, max_value=10**15))
def test_a_duration_survives_being_written(length_us: int) -> None:
    assert parse_duration_us(format_duration(length_us)) == length_us


@given(st.integers(min_value=0, max_value=4 * 10**15))
def test_an_instant_survives_being_written(instant_us: int) -> None:
    assert parse_instant_us(format_instant(instant_us)) == instant_us


def test_an_instant_without_a_zone_is_utc() -> None:
    expected = int(datetime(1998, 7, 1, tzinfo=UTC).timestamp()) * 1_000_000
    for same in ("1998-07-01", "1998-07-01T00:00:00", "1998-07-01T02:00:00+02:00", date(1998, 7, 1)):
        assert parse_instant_us(same) == expected
    assert parse_instant_us(datetime.fromisoformat("1998-07-01")) == expected


def test_an_instant_that_cannot_be_read_is_refused_with_an_example() -> None:
    with pytest.raises(InvalidValueError, match="1998-07-01"):
        parse_instant_us("next tuesday")


def test_a_replay_clock_starts_at_its_origin_and_keeps_the_pace() -> None:
    clock = ReplayClock(1_000, 0, speed=0.0)
    assert clock.now_us() == clock.now_us() == 1_000
    assert ReplayClock(parse_instant_us("1998-07-01"), 0, speed=1.0).now_us() > parse_instant_us("2050-01-01")


def test_replay_clocks_of_one_home_agree_and_a_new_origin_starts_anew(tmp_path: Path) -> None:
    anchor = tmp_path / "deep" / "clock.json"
    first, second = (ReplayClock.anchored(5, anchor) for _ in range(2))
    assert first.anchor_us == second.anchor_us
    assert ReplayClock.anchored(6, anchor).origin_us == 6
    anchor.write_text("{not json")
    assert ReplayClock.anchored(6, anchor).origin_us == 6


def test_a_manual_clock_moves_only_when_told() -> None:
    clock = ManualClock(7)
    clock.advance(3)
    assert clock.now_us() == 10
    clock.set(1)
    assert clock.now_us() == 1


def test_microseconds_are_kept_exactly() -> None:
    assert to_datetime(1) - to_datetime(0) == timedelta(microseconds=1)
