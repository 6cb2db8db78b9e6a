"""The benchmarks run, and what they rest on does what it says; how quick anybody is isn't tested here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import activities, duckdb_join, peers, point_in_time, ray_data_join
from heliostat.clock import US_PER_DAY

PLAN = point_in_time.Plan(events=5_000, rows=400, users=50, runs=1, seed=3, buckets=2, partitions=1)


# ── The generator ───────────────────────────────────────────────────────────────────


def test_the_same_seed_gives_the_same_activities_and_another_gives_others() -> None:
    first, again, other = (activities.events(2_000, 100, seed) for seed in (1, 1, 2))
    assert first.equals(again)
    assert not first.equals(other)
    assert activities.spine(50, 100, 1).equals(activities.spine(50, 100, 1))


def test_activities_are_in_order_of_time_over_sixty_days_with_distinct_ids() -> None:
    events = activities.events(20_000, 500, 0)
    times = events.column("happened_at").cast(pa.int64()).to_numpy()
    assert events.schema == activities.EVENT_SCHEMA
    assert (np.diff(times) >= 0).all()
    assert times[0] >= activities.START_US
    assert 59 * US_PER_DAY < times[-1] - activities.START_US < 60 * US_PER_DAY
    assert len(set(events.column("event_id").to_pylist())) == 20_000
    assert set(events.column("type").to_pylist()) == set(activities.TYPES)
    assert 0 < events.column("session_duration").null_count < 1_000


def test_a_few_users_do_much_of_it_and_the_spine_asks_about_all_alike() -> None:
    per_user = np.sort(np.bincount(activities.events(100_000, 1_000, 0).column("user_id").to_numpy()))[::-1]
    assert per_user[:100].sum() > 0.4 * 100_000
    asked = np.bincount(activities.spine(100_000, 1_000, 0).column("user_id").to_numpy(), minlength=1_000)
    assert asked.max() < 2 * asked.mean()


# ── Contenders ──────────────────────────────────────────────────────────────────────


def test_heliostat_and_ray_data_give_the_same_answers(ray_local: None, tmp_path: Path) -> None:  # noqa: ARG001
    place = point_in_time.Place(tmp_path)
    point_in_time.prepare(place, PLAN)
    point_in_time.heliostat_join(place, place.event_log(PLAN.buckets))
    ray_data_join.join(place.events, place.spine, place.result(point_in_time.RAY_DATA), PLAN.partitions)
    contenders = [point_in_time.OURS, point_in_time.RAY_DATA]
    assert point_in_time.disagreements(place, contenders) == []

    answer = pq.read_table(place.result(point_in_time.OURS))
    counts = answer.column("activity_count").to_pylist()
    assert answer.num_rows == PLAN.rows
    assert sum(counts) > PLAN.rows
    counts[7] += 1
    changed = answer.set_column(answer.column_names.index("activity_count"), "activity_count", pa.array(counts))
    pq.write_table(changed, place.result(point_in_time.OURS))
    (difference,) = point_in_time.disagreements(place, contenders)
    assert difference.startswith("Ray Data's activity_count differs in 1 rows; in row 7: ")


def test_the_benchmark_runs_as_a_program_without_any_peer() -> None:
    small = [
        "--events=3000",
        "--rows=200",
        "--users=40",
        "--runs=1",
        "--buckets=2",
        "--skip=duckdb",
        "--skip=ray-data",
    ]
    program = Path(point_in_time.__file__)
    done = subprocess.run(
        [sys.executable, str(program), *small], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "# Point-in-time join: 3,000 events × 200 spine rows" in done.stdout
    assert "| Heliostat " in done.stdout


def test_the_peers_program_imports_nothing_of_heliostat() -> None:
    program = Path(duckdb_join.__file__).read_text()
    assert "import heliostat" not in program
    assert "from heliostat" not in program
    assert "from benchmarks" not in program


# ── What benchmarks share ───────────────────────────────────────────────────────────


def test_an_environment_is_made_again_only_when_its_requirements_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    python = peers.python_of("own", [])
    assert "making .bench/own" in capsys.readouterr().out
    made = python.stat().st_mtime_ns, (tmp_path / "own" / "pyvenv.cfg").stat().st_mtime_ns
    assert peers.python_of("own", []) == python
    assert capsys.readouterr().out == ""
    assert (python.stat().st_mtime_ns, (tmp_path / "own" / "pyvenv.cfg").stat().st_mtime_ns) == made
    found = subprocess.run([str(python), "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True)
    assert Path(found.stdout.strip()) == tmp_path / "own"


def test_memory_is_that_of_the_whole_tree_without_what_is_left_out() -> None:
    grows = "import sys; kept = b'x' * 200_000_000; print('ready', flush=True); sys.stdin.readline()"
    with subprocess.Popen(
        [sys.executable, "-c", grows], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with peers.PeakMemory.of() as all_of_it:
            pass
        alone = peers.tree_bytes(without=(child.pid,))
        assert peers.tree_bytes(child.pid) > 200_000_000
        assert all_of_it.peak_bytes - alone > 180_000_000
        child.communicate()


def test_contenders_take_turns_after_warming_up(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def named(name: str, *seconds: float) -> peers.Contender:
        left = list(seconds)
        return peers.Contender(lambda: (order.append(name), left.pop(0))[1], runs=len(seconds) - 1)

    turns = peers.interleaved({"a": named("a", 9, 1, 5, 2), "b": named("b", 9, 4)})
    assert order == ["a", "b", "a", "b", "a", "a"]
    assert (turns["a"].median_s, turns["b"].median_s) == (2, 4)
    assert "b: run 1, 4.00 s" in capsys.readouterr().out


def test_a_report_is_a_table_for_people_and_a_document_for_programs(tmp_path: Path) -> None:
    report = peers.Report("A title", ["who", "seconds"], [["a", 0.12345], ["b", 12345]], ["a note"], {"cores": 2})
    page = report.write("example", folder=tmp_path)
    assert page.read_text() == (
        "# A title\n\n"
        "| who | seconds |\n|-----|---------|\n| a   | 0.123   |\n| b   | 12,345  |\n\n"
        "- a note\n\nMeasured with cores 2.\n"
    )
    document = json.loads((tmp_path / "example.json").read_text())
    assert document["rows"] == [["a", 0.12345], ["b", 12345]]


def test_facts_name_no_machine_and_no_path() -> None:
    found = peers.facts("numpy", events=5)
    assert next(iter(found)) == "events"
    assert found["numpy"] == np.__version__
    assert not any("/" in str(value) for value in found.values())
