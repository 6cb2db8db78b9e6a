from __future__ import annotations

import asyncio

import pytest

from benchmarks.load import Outcome, bodies, generate


@pytest.mark.parametrize("url", ["http://192.0.2.1:80/predict", "http://example.org:80/", "http://127.0.0.1/predict"])
def test_only_a_loopback_address_with_a_port_is_loaded(url: str) -> None:
    with pytest.raises(ValueError, match="loopback"):
        asyncio.run(generate(url, [b"{}"], concurrency=1, seconds=1, most=1))


@pytest.mark.parametrize(
    "bounds",
    [
        {"concurrency": 1_000, "seconds": 1, "most": 1},
        {"concurrency": 1, "seconds": 3_600, "most": 1},
        {"concurrency": 1, "seconds": 1, "most": 10**9},
    ],
)
def test_load_is_bounded_in_time_number_and_connections(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at most"):
        asyncio.run(generate("http://127.0.0.1:9/predict", [b"{}"], **bounds))


def test_figures_are_of_the_answers_alone() -> None:
    outcome = Outcome(requests=100, failed=3, seconds=2.0, latencies_ms=[float(each) for each in range(100)])
    summary = outcome.summary()
    assert (summary["requests_per_s"], summary["p50_ms"], summary["p99_ms"]) == (50.0, 50.0, 99.0)


def test_the_same_seed_asks_for_the_same_entities() -> None:
    assert bodies(3, 10, seed=1) == bodies(3, 10, seed=1) != bodies(3, 10, seed=2)
