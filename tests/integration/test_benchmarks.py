"""The benchmarks run, and what they rest on does what it says; how quick anybody is isn't tested here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import (
    activities,
    compared,
    feast_join,
    materialization,
    online_read,
    peers,
    point_in_time,
    processes,
    programs,
    ray_data_join,
    request_parts,
    scoring_servers,
    sizing,
)
from heliostat.clock import US_PER_DAY
from heliostat.storage.online_store import OnlineConfig, OnlineStore

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


def test_batches_of_activities_go_on_where_the_last_one_ended_with_the_same_users() -> None:
    batches = list(activities.event_batches(25_000, 300, 4, batch_rows=10_000, busiest=0.1))
    whole = pa.concat_tables(batches)
    times = whole.column("happened_at").cast(pa.int64()).to_numpy()
    assert max(batch.num_rows for batch in batches) <= 10_000
    assert (np.diff(times) >= 0).all()
    assert whole.column("event_id").to_pylist() == list(range(25_000))
    shares = [np.bincount(batch.column("user_id").to_numpy(), minlength=300) / batch.num_rows for batch in batches]
    assert all(0.08 < share[0] < 0.15 for share in shares)
    assert np.corrcoef(shares[0][1:], shares[-1][1:])[0, 1] > 0.9


def test_a_few_users_do_much_of_it_and_the_spine_asks_about_all_alike() -> None:
    per_user = np.sort(np.bincount(activities.events(100_000, 1_000, 0).column("user_id").to_numpy()))[::-1]
    assert per_user[:100].sum() > 0.4 * 100_000
    asked = np.bincount(activities.spine(100_000, 1_000, 0).column("user_id").to_numpy(), minlength=1_000)
    assert asked.max() < 2 * asked.mean()


# ── Contenders ──────────────────────────────────────────────────────────────────────


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.benchmark
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
        [sys.executable, str(program), *small], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "# Point-in-time join: 3,000 events × 200 spine rows" in done.stdout
    assert "| Heliostat " in done.stdout


@pytest.mark.parametrize("name", ["duckdb_join.py", "feast_store.py", "bento_service.py", "mlflow_model.py"])
def test_a_peers_program_imports_nothing_of_heliostat(name: str) -> None:
    program = (peers.ROOT / "benchmarks" / name).read_text()
    assert "import heliostat" not in program
    assert "from heliostat" not in program
    assert "from benchmarks" not in program


# ── Beside Feast ────────────────────────────────────────────────────────────────────


def test_what_feast_is_given_is_what_rings_say(tmp_path: Path) -> None:
    plan = online_read.SMOKE
    with (
        programs.valkey_server(tmp_path / "valkey") as port,
        OnlineStore(OnlineConfig(url=f"redis://127.0.0.1:{port}", project="bench")) as store,
    ):
        online_read.fill(store, online_read.VIEWS, plan)
        online_read.write_values(plan, tmp_path)
        for vector in online_read.VECTORS:
            read = online_read.Ours(store, vector.views).read(list(range(plan.users)))
            given = [pq.read_table(tmp_path / f"{view.name}.parquet") for view in vector.views]
            columns = [
                table.column(name).to_numpy(zero_copy_only=False)
                for view, table in zip(vector.views, given, strict=True)
                for name in view.feature_names
            ]
            assert vector.n_features == len(columns) == read.shape[1]
            np.testing.assert_allclose(read, np.column_stack(columns), rtol=online_read.TOLERANCE)
        assert np.nanmax(read) > 0


def test_the_same_ten_features_come_out_of_one_two_and_three_views() -> None:
    whole, *parts = online_read.VECTORS[:3]
    names = list(whole.views[0].feature_names)
    assert [len(vector.views) for vector in online_read.VECTORS] == [1, 2, 3, 2, 3]
    for vector in parts:
        assert [name for view in vector.views for name in view.feature_names] == names


def test_online_reads_are_measured_without_feast(capsys: pytest.CaptureFixture[str]) -> None:
    assert online_read.main(["--smoke"]) == 0
    said = capsys.readouterr().out
    assert "# Online read" in said
    assert "Measured with feast skipped" in said
    assert said.count("| Heliostat, rings merged") == 2 * len(online_read.VECTORS)


def test_historical_features_are_the_newest_rows_before_each_instant(tmp_path: Path) -> None:
    place = feast_join.Place(tmp_path / "files")
    feast_join.prepare(place, feast_join.Size(events=2_000, rows=300, users=40))
    feast_join.heliostat_join(place, feast_join.NEWEST, feast_join.ALONE)
    rows, spine = (pq.read_table(file).to_pandas() for file in (place.feature_rows, place.spine))
    expected = pd.merge_asof(
        spine.sort_values(feast_join.TIME),
        rows.sort_values(feast_join.TIME),
        on=feast_join.TIME,
        by="user_id",
        allow_exact_matches=False,
    ).sort_values("row")
    answer = pq.read_table(place.answer(feast_join.ALONE)).sort_by("row")
    for name in feast_join.VALUES:
        np.testing.assert_array_equal(answer.column(name).to_numpy(zero_copy_only=False), expected[name].to_numpy())


def test_feasts_answer_is_compared_row_by_row_and_its_missing_rows_are_counted(tmp_path: Path) -> None:
    place = feast_join.Place(tmp_path)
    values = {name: [1.0, 2.0, None] for name in feast_join.VALUES}
    ours = pa.table({"row": [0, 1, 2], **{name: pa.array(given, pa.float64()) for name, given in values.items()}})
    for contender in (feast_join.ALONE, feast_join.ON_RAY):
        pq.write_table(ours, place.answer(contender))
    pq.write_table(ours.slice(0, 2), place.answer(feast_join.FEAST))
    assert feast_join.compare(place) == (1, [])
    pq.write_table(ours.slice(1, 2), place.answer(feast_join.FEAST))
    lost, differences = feast_join.compare(place)
    assert (lost, len(differences)) == (1, 2 * len(feast_join.VALUES))
    assert "Feast has no row where" in differences[0]
    changed = ours.set_column(1, feast_join.VALUES[0], pa.array([1.0, 2.5, None]))
    pq.write_table(changed, place.answer(feast_join.FEAST))
    assert feast_join.compare(place)[1][0].startswith("activities differs in 1 rows; in row 1: Feast ")


def test_totals_run_over_each_users_own_activities() -> None:
    events = activities.events(3_000, 30, 5)
    rows = feast_join.running_totals(events).to_pandas()
    given = events.to_pandas()
    durations = given["session_duration"].fillna(0.0)
    by_user = given["user_id"]
    np.testing.assert_array_equal(rows["activities"], given.groupby(by_user).cumcount() + 1)
    np.testing.assert_allclose(rows["duration"], durations.groupby(by_user).cumsum())
    np.testing.assert_allclose(rows["longest"], durations.groupby(by_user).cummax())
    np.testing.assert_array_equal(rows["last_weight"], given["type"].map(activities.WEIGHTS))


def test_materialized_values_are_checked_before_anybody_is_timed(tmp_path: Path) -> None:
    with programs.valkey_server(tmp_path / "valkey") as port:
        place = materialization.Place(tmp_path, port)
        entities = materialization.prepare(place, materialization.Plan(users=40, events=600, runs=1))
        assert 30 <= entities <= 40
        materialization.check(place, None)
        assert place.used_bytes() > 0
        values = pq.read_table(place.values)
        pq.write_table(values.set_column(2, "count_30d", pa.array(np.full(entities, 0.5))), place.values)
        with pytest.raises(SystemExit, match="Heliostat brings other values online"):
            materialization.check(place, None)


# ── Scoring servers ─────────────────────────────────────────────────────────────────


def test_where_heliostat_is_behind_a_scoring_server_is_said() -> None:
    def costed(requests_per_s: float, p99_ms: float) -> scoring_servers.Costed:
        return scoring_servers.Costed([requests_per_s], [1.0], [p99_ms], 0, [1.0])

    ours, peers_ = ("Heliostat", "Heliostat, log async", "Heliostat, Open Inference Protocol"), scoring_servers.PEERS
    ahead = {name: costed(1_000, 20) for name in ours} | {name: costed(900, 30) for name in peers_}
    assert list(scoring_servers.behind({(1, 16): ahead})) == []
    mixed = {**ahead, "Heliostat": costed(450, 20), "Heliostat, log async": costed(1_000, 60)}
    assert list(scoring_servers.behind({(100, 64): mixed})) == [
        f"{what}, 100 rows at 64: behind {peer}: {how}."
        for peer in peers_
        for what, how in (
            ("Heliostat", "0.50 of its requests/s"),
            ("Heliostat, log async", "p99 2.00 times its p99"),
        )
    ]


def test_processor_time_of_a_process_tree_is_counted_while_it_runs() -> None:
    burns = "import sys, time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True); sys.stdin.readline()"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burns!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        pids = processes.tree(parent.pid)
        assert pids[0] == parent.pid
        assert len(pids) == 2
        assert 0.25 < processes.cpu_s(pids[1:]) < 5
        assert processes.titled(sys.executable.rpartition("/")[2].encode(), holding=b"process_time")
        parent.communicate("")
    assert processes.cpu_s(pids) == 0


STACKS = """
thread (7): ray;run (threading.py:9);Predictor._answer (serving/predictor.py:2);predict (lightgbm/basic.py:4) 6
thread (7): ray;run (threading.py:9);FeatureLookup.__call__ (heliostat/serving/lookup.py:2);pack (redis/a.py:4) 3
thread (7): ray;run (threading.py:9);ABRouter.__call__ (heliostat/serving/routing.py:2) 2
thread (7): ray;run (threading.py:9) 1
thread (7): ray;run (threading.py:9);StreamReaderProtocol.data_received (asyncio/streams.py:3) 12
thread (8): pool;_worker (concurrent/futures/thread.py:81);json_response (http.py:3) 5
""".strip()


def test_a_threads_time_is_shared_out_by_what_its_samples_were_for() -> None:
    seen = request_parts.shares(STACKS.splitlines())
    assert seen[7] == {
        "predict": 6,
        "look features up": 3,
        "route": 2,
        request_parts.OTHER: 1,
        request_parts.REPLIES: 12,
    }
    shared = request_parts.shared_out({7: 240.0, 8: 50.0, 9: 30.0}, seen)
    assert shared == {
        "predict": 60.0,
        "look features up": 30.0,
        "route": 20.0,
        request_parts.OTHER: 10.0,
        request_parts.REPLIES: 120.0,
        "answer": 50.0,
        request_parts.RAY: 30.0,
    }


@pytest.mark.slow
@pytest.mark.benchmark
def test_the_benchmark_beside_scoring_servers_runs() -> None:
    command = [sys.executable, "benchmarks/scoring_servers.py", "--smoke"]
    done = subprocess.run(command, cwd=peers.ROOT, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 2 * 2 * 3
    assert all(float(row[7]) > 0 and row[8] == "0" for row in rows[1:])


# ── The page ────────────────────────────────────────────────────────────────────────


def test_the_page_shows_what_the_result_files_say() -> None:
    page = compared.PAGE.read_text()
    assert compared.written(page) == page, "run benchmarks/compared.py"


def test_the_page_of_sizes_says_what_the_result_files_do_and_its_sums_are_right() -> None:
    page = sizing.PAGE.read_text()
    assert sizing.written(page) == page, "run benchmarks/sizing.py"
    assert page.count("| --- |") >= len(sizing.TABLES), "every table is on the page"
    lines = {line[0].strip("*").partition("**")[0]: line[1:] for line in sizing.requests(sizing.RESULTS)[1:]}
    parts = {row["µs a request"]: row for row in sizing.result("serving_parts", sizing.RESULTS)}
    whole = [parts["together"][f"{size}, 16 at once"] for size in ("1 entity", "100 entities")]

    def numbers(name: str) -> list[float]:
        return [float(each.replace(",", "")) for each in lines[name]]

    assert numbers("cores for them") == pytest.approx([1_000 * each / 1e6 / 0.6 for each in whole], rel=0.01)
    replica, *others = (numbers(name) for name in lines if name.endswith(("µs a request", ", µs")))
    together = [sum(each) for each in zip(replica, *others, strict=True)]
    assert together == pytest.approx(whole, rel=0.01), "replica, HAProxy and server are all of it"
    needed = zip(numbers("replicas for 1,000 requests/s"), replica, strict=True)
    assert all(0.6 * (n - 1) < 1_000 * busy_us / 1e6 <= 0.6 * n for n, busy_us in needed)


def test_a_comparison_says_how_many_times_as_quick_and_whether_that_was_the_goal(tmp_path: Path) -> None:
    columns = ["rows at rest", "spine rows", "users", "question", "contender", "seconds", "s, file to file"]
    rows = [
        [200, 100, 10, "newest row", "Feast", 6.0, 7.0],
        [200, 100, 10, "newest row", "Heliostat, one process", 0.5, 0.7],
        [200, 100, 10, "newest row", "Heliostat on Ray", 1.0, 1.4],
        [200, 100, 10, "windows of 30 days", "Heliostat on Ray", 1.0, 1.4],
        [900, 100, 10, "newest row", "Feast", "stopped after 300 s", ""],
        [900, 100, 10, "newest row", "Heliostat on Ray", 2.0, 2.4],
    ]
    peers.Report("A title", columns, rows).write("feast_join", folder=tmp_path)
    _, _, *lines = compared.table(tmp_path).splitlines()
    assert [line.split(" | ")[1:] for line in lines] == [
        ["0.500 s", "Feast", "6.00 s", "12.0", "≥ 10.0", "yes |"],
        ["0.700 s", "Feast", "7.00 s", "10.0", "", " |"],
        ["1.00 s", "Feast", "6.00 s", "6.00", "≥ 10.0", "no |"],
        ["1.40 s", "Feast", "7.00 s", "5.00", "", " |"],
        ["2.00 s", "Feast", "stopped after 300 s", "", "≥ 10.0", " |"],
    ]


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


ECHO = """
import json, sys, time
print(json.dumps({"version": "1"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "end":
        sys.exit(3)
    kept = b"x" * asked.get("bytes", 0)
    time.sleep(asked.get("seconds", 0))
    print(json.dumps({"said": asked["do"]}), flush=True)
"""


def test_a_peers_program_answers_until_it_ends(tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text(ECHO)
    with programs.Program.started(Path(sys.executable), str(tmp_path / "echo.py"), name="Echo") as program:
        assert program.greeting == {"version": "1"}
        assert program.ask(do="this") == {"said": "this"}
        with pytest.raises(programs.ProgramEndedError, match="Echo's process ended with exit code 3"):
            program.ask(do="end")


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"seconds": 60}, "stopped after 0.5 s"), ({"seconds": 60, "bytes": 300_000_000}, "stopped at 0 GiB of memory")],
)
def test_a_peers_program_is_stopped_beyond_its_limits(tmp_path: Path, asked: dict[str, int], said: str) -> None:
    (tmp_path / "echo.py").write_text(ECHO)
    limits = programs.Limits(seconds=30 if "bytes" in asked else 0.5, memory_bytes=200_000_000)
    with programs.Program.started(Path(sys.executable), str(tmp_path / "echo.py"), name="Echo") as program:
        assert program.ask_within(limits, do="quick") == {"said": "quick"}
        with pytest.raises(programs.LimitExceededError, match=f"Echo was {said}"):
            program.ask_within(limits, do="slow", **asked)


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


@pytest.mark.slow
@pytest.mark.benchmark
def test_the_footprint_benchmark_runs_and_weighs_everything() -> None:
    command = [sys.executable, "benchmarks/footprint.py", "--smoke"]
    done = subprocess.run(command, cwd=peers.ROOT, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:2] == "| "]
    wanted = [row["what"] for row in sizing.result("footprint", sizing.RESULTS)]
    assert [row[0] for row in rows[1:]] == wanted
    assert all(float(row[1].replace(",", "")) >= 0 for row in rows[1:])


@pytest.mark.slow
@pytest.mark.benchmark
def test_the_ingestion_benchmark_runs_and_finds_every_event_where_it_should_be() -> None:
    command = [sys.executable, "benchmarks/ingestion.py", "--smoke"]
    done = subprocess.run(command, cwd=peers.ROOT, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[1:]] == [
        *["POST /events"] * 2,
        *["intake, without HTTP"] * 2,
        "Parquet -> log, new",
        "Parquet -> log, known already",
    ]
