from __future__ import annotations

import json
import logging
import multiprocessing
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.telemetry import _JsonFormatter, _TextFormatter
from heliostat.tracing import CURRENT, Trace, random_hex

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("header", "sampled"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-00", False),
        (f"00-{TRACE}-{PARENT}-ff", True),
        (f"cc-{TRACE}-{PARENT}-01-what-the-future-brings", True),
    ],
)
def test_a_callers_trace_goes_on_with_a_part_of_our_own(header: str, sampled: bool) -> None:
    trace = Trace.of(header.encode())
    assert (trace.trace_id, trace.sampled) == (TRACE, sampled)
    ours = trace.header.decode()
    assert re.fullmatch(rf"00-{TRACE}-[0-9a-f]{{16}}-0{int(sampled)}", ours)
    assert PARENT not in ours
    assert Trace.of(trace.header).trace_id == TRACE


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "hello",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01\n",
        f"cc-{TRACE}-{PARENT}-01more",
        f" 00-{TRACE}-{PARENT}-01",
    ],
)
def test_what_isnt_valid_is_passed_over_and_a_new_trace_begins(header: str | None) -> None:
    found = {Trace.of(None if header is None else header.encode()).trace_id for _ in range(2)}
    assert len(found) == 2
    assert TRACE not in found
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in found)


@given(st.binary(max_size=80))
def test_whatever_a_header_holds_there_is_a_trace(header: bytes) -> None:
    assert Trace.of(Trace.of(header).header).trace_id


def test_a_line_of_the_log_names_the_request_that_it_is_about() -> None:
    record = logging.LogRecord("heliostat.gateway", logging.WARNING, __file__, 1, "answered %d", (503,), None)
    assert "trace" not in _TextFormatter().format(record) + _JsonFormatter().format(record)
    token = CURRENT.set(Trace.of(f"00-{TRACE}-{PARENT}-01".encode()))
    assert _TextFormatter().format(record).endswith(f"answered 503 (trace {TRACE})")
    assert json.loads(_JsonFormatter().format(record))["trace_id"] == TRACE
    CURRENT.reset(token)


def test_a_trace_knows_how_long_ago_it_arrived() -> None:
    assert 4.0 <= Trace("a" * 32, begun_s=time.perf_counter() - 0.005).age_ms < 1_000


def test_random_texts_are_as_long_as_asked_for_and_never_the_same() -> None:
    texts = [random_hex(16) for _ in range(10_000)]
    assert len(set(texts)) == 10_000
    assert {len(text) for text in texts} == {32}
    assert len(random_hex(8)) == 16
    assert all(set(text) <= set("0123456789abcdef") for text in texts)


def test_a_forked_process_draws_others_than_its_parent() -> None:
    random_hex(16)  # some lie ready
    with multiprocessing.get_context("fork").Pool(1) as pool:
        theirs = set(pool.map(random_hex, [16] * 200))
    assert not theirs & {random_hex(16) for _ in range(400)}


def test_threads_never_draw_the_same() -> None:
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(random_hex, [16] * 20_000))
    assert len(set(texts)) == 20_000
