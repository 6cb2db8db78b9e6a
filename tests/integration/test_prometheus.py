"""What a scrape of a real graph shows: every metric, with the right numbers, also after a replica died."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deployments import graph
from heliostat.ports import free_ports
from heliostat.serving.telemetry import STAGES
from heliostat.telemetry import METRICS
from heliostat.workspace import Workspace
from tests.integration.test_serving import Shop, purchase, register, settings_on_serve

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
ALERTS = Path(__file__).parents[2] / "configs" / "alerts.yaml"
_OWN = {"replica", *(label for metric in METRICS for label in metric.labels), "le"}


@pytest.fixture(scope="module")
def shop(session_home: Path, valkey: str, ray_local: None) -> Iterator[Shop]:  # noqa: ARG001 - it must run
    with Workspace.open(settings_on_serve(session_home / "prometheus", valkey, deadline_ms=20_000.0)) as workspace:
        yield Shop(workspace)
    graph.undeploy()


def target() -> str:
    """Where Ray serves the numbers of its only node."""
    (node,) = ray.nodes()
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


def serve_a_broken_version(shop: Shop, number: int) -> None:
    version = register(shop.workspace, number)
    folder = shop.workspace.settings.home / "data" / "artifacts"
    (folder / shop.workspace.models.get("churn", version).artifact / "model.txt").write_text("broken")
    shop.workspace.rollout.serve("churn", version, reason="broken on purpose")


class Scraper:
    """Scrapes as Prometheus does, and keeps what it saw."""

    def __init__(self) -> None:
        self._url = f"http://{target()}/metrics"
        self.seen: list[Series] = []

    def scrape(self) -> Series:
        found: Series = {}
        for family in text_string_to_metric_families(httpx.get(self._url, timeout=10).text):
            for sample in family.samples:
                if sample.labels.get("application") == graph.APP_NAME and "heliostat_" in sample.name:
                    labels = frozenset((key, value) for key, value in sample.labels.items() if key in _OWN)
                    found[sample.name.removeprefix("ray_"), labels] = sample.value
        self.seen.append(found)
        return found

    def until(self, right: Callable[[Series], bool], *, limit_s: float = 60.0) -> Series:
        limit = time.monotonic() + limit_s
        while not right(found := self.scrape()):
            assert time.monotonic() < limit, {name for name, _ in found}
            time.sleep(0.5)
        return found

    def increase(self, name: str, **labels: str) -> float:
        """As PromQL's ``sum(increase(…))`` counts, without its extrapolation."""
        total = 0.0
        for before, after in zip(self.seen, self.seen[1:], strict=False):
            for key in before.keys() & after.keys():
                if key[0] == name and labels.items() <= dict(key[1]).items():
                    assert after[key] >= before[key], f"{key} fell"
                    total += after[key] - before[key]
        return total


def value(found: Series, name: str, **labels: str) -> float:
    return sum(each for (known, own), each in found.items() if known == name and labels.items() <= dict(own).items())


def quantile(share: float, found: Series, name: str, **labels: str) -> float:
    """As PromQL's ``histogram_quantile(share, sum by (le) (…))``."""
    counts: dict[float, float] = {}
    for (known, own), each in found.items():
        if known == f"{name}_bucket" and labels.items() <= dict(own).items():
            bound = float(dict(own)["le"])
            counts[bound] = counts.get(bound, 0) + each
    rank, below, low = share * counts[float("inf")], 0.0, 0.0
    for bound, count in sorted(counts.items()):
        if count >= rank:
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / (count - below)
        below, low = count, bound
    raise AssertionError(counts)


@pytest.mark.slow  # Ray reports every ten seconds
def test_a_scrape_shows_every_metric_with_the_numbers_of_known_requests(shop: Shop) -> None:
    scraper = Scraper()
    with httpx.Client(base_url=graph.deploy(shop.workspace.settings), timeout=20) as client:
        known = scraper.until(lambda found: value(found, "heliostat_models_loaded") >= 1)
        assert "heliostat_fallbacks_total" in {name for name, _ in known}, "before there is one"
        assert value(known, "heliostat_fallbacks_total") == 0
        spent: list[float] = []
        for n in range(30):
            begin = time.perf_counter()
            assert client.post("/predict", json={"entity_ids": [n, n + 1]}).status_code == 200
            spent.append((time.perf_counter() - begin) * 1e3)
        assert client.post("/predict", json={"entity_ids": []}).status_code == 422
        assert client.get("/nope").status_code == 404
        events = [purchase(n, n, "1998-06-20") for n in range(1, 6)]
        assert client.post("/events", json={"source": "purchases", "events": events}).status_code == 200
        serve_a_broken_version(shop, 3)
        answer = client.post("/predict", json={"entity_ids": [1, 2, 3]}).json()
        rung = answer["fallback"]
        assert rung is not None
        shop.workspace.rollout.serve("churn", 1, reason="back")
        found = scraper.until(lambda found: value(found, "heliostat_fallbacks_total", rung=rung) == 3)

    names = {name for name, _ in found}
    for metric in METRICS:
        endings = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        if metric.name != "heliostat_unlogged_predictions_total":  # answers waited for the log
            assert {f"{metric.name}{ending}" for ending in endings} <= names, metric.name
    assert value(found, "heliostat_requests_total", route="/predict", status="200") == 31
    assert value(found, "heliostat_requests_total", route="/predict", status="422") == 1
    assert value(found, "heliostat_requests_total", status="404") == 1
    assert value(found, "heliostat_events_total", source="purchases", outcome="accepted") == 5
    assert value(found, "heliostat_predictions_total", model="churn", version="1") >= 60
    assert value(found, "heliostat_predictions_total", model="churn") == 63
    assert value(found, "heliostat_batch_rows_sum", queue="predict churn") == 63
    assert value(found, "heliostat_batch_rows_sum", queue="events purchases") == 5
    assert value(found, "heliostat_missing_features_total", model="churn") > 0
    assert value(found, "heliostat_cache_total", cache="models", outcome="hit") >= 30
    assert value(found, "heliostat_requests_in_flight") == 0
    waiting = scraper.until(lambda found: value(found, "heliostat_stream_entries", stream="events purchases") == 5)
    assert value(waiting, "heliostat_stream_entries", stream="predictions") > 0
    assert 0 < value(waiting, "heliostat_stream_age_seconds", stream="predictions") < 600

    for stage in STAGES:
        name = f"heliostat_{stage}_latency_ms"
        assert value(found, f"{name}_count", model="churn") == 31, stage
        assert value(found, f"{name}_bucket", model="churn", le="+Inf") == 31, stage
        bounds = sorted(
            (float(dict(own)["le"]), each) for (known, own), each in found.items() if known == f"{name}_bucket"
        )
        assert [each for _, each in bounds] == sorted(each for _, each in bounds), "buckets hold what is below"
    stages_ms = sum(value(found, f"heliostat_{stage}_latency_ms_sum") for stage in STAGES)
    whole_ms = value(found, "heliostat_request_latency_ms_sum", route="/predict")
    assert 0 < stages_ms < whole_ms, "stages are parts of the whole"
    median = quantile(0.5, found, "heliostat_request_latency_ms", route="/predict")
    assert 0 < median <= 2.5 * sorted(spent)[len(spent) // 2], "a bucket's width at most above what the client saw"
    assert median <= quantile(0.9, found, "heliostat_request_latency_ms", route="/predict")

    # A replica dies: its series end, the next one's begin at 0, and nothing that is counted falls.
    (dead,) = {dict(own)["replica"] for _, own in found}
    before = len(scraper.seen) - 1
    ray.kill(ray.get_actor(f"SERVE_REPLICA::{graph.APP_NAME}#Gateway#{dead}", namespace="serve"))
    scraper.until(lambda found: any(dict(own)["replica"] != dead for _, own in found))
    with httpx.Client(base_url=graph.deploy(shop.workspace.settings), timeout=20) as client:
        for n in range(7):
            assert client.post("/predict", json={"entity_ids": [n]}).status_code == 200
    after = scraper.until(
        lambda found: (
            dead not in {dict(own)["replica"] for _, own in found}
            and value(found, "heliostat_requests_total", route="/predict") == 7
        )
    )
    assert value(after, "heliostat_predictions_total") == 7
    scraper.seen = scraper.seen[before:]
    for name in ("heliostat_request_latency_ms_count", "heliostat_predict_latency_ms_bucket"):
        assert scraper.increase(name) >= 0
    assert scraper.increase("heliostat_fallbacks_total") == 0


class Prometheus:
    """The server itself, with the project's alerts, looking at Ray every second."""

    def __init__(self, program: str, folder: Path) -> None:
        self._address = f"127.0.0.1:{free_ports('127.0.0.1', 1)[0]}"
        (folder / "prometheus.yml").write_text(
            json.dumps(  # which is YAML
                {
                    "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                    "rule_files": [str(ALERTS)],
                    "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [target()]}]}],
                }
            )
        )
        self._process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address={self._address}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, path: str, **parameters: str) -> dict[str, list[dict[str, object]]]:
        answer = httpx.get(f"http://{self._address}/api/v1/{path}", params=parameters, timeout=10).raise_for_status()
        return answer.json()["data"]

    def alerts(self) -> dict[str, dict[str, object]]:
        """Each rule by its alert's name."""
        try:
            (group,) = self.ask("rules")["groups"]
        except httpx.HTTPError:
            return {}
        return {rule["name"]: rule for rule in group["rules"]}  # type: ignore[attr-defined, index, misc] # JSON

    def until(self, right: Callable[[dict[str, dict[str, object]]], bool], *, limit_s: float = 60.0) -> None:
        limit = time.monotonic() + limit_s
        while not right(found := self.alerts()):
            assert time.monotonic() < limit, {name: rule["state"] for name, rule in found.items()}
            time.sleep(0.5)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)


@pytest.mark.slow  # Ray reports every ten seconds
def test_a_prometheus_evaluates_every_alert_on_a_real_graph_and_rings_for_its_fallbacks(
    shop: Shop, tmp_path: Path
) -> None:
    program = shutil.which("prometheus") or shutil.which("prometheus", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("there is no Prometheus: `make services` gets it from Debian's packages")
    prometheus = Prometheus(program, tmp_path)
    try:
        with httpx.Client(base_url=graph.deploy(shop.workspace.settings), timeout=20) as client:
            assert client.post("/predict", json={"entity_ids": [1, 2]}).status_code == 200
            assert client.post("/predict", json={"entity_ids": []}).status_code == 422
            events = [purchase(n, n, "1998-06-20") for n in range(6, 9)]
            assert client.post("/events", json={"source": "purchases", "events": events}).status_code == 200
            prometheus.until(lambda found: bool(found) and found["HeliostatGone"]["state"] == "inactive")
            assert prometheus.alerts()["HeliostatFallbacks"]["state"] == "inactive"
            serve_a_broken_version(shop, 4)

            def rings(found: dict[str, dict[str, object]]) -> bool:
                # Again and again: what a replica counts before its first report has no rise.
                assert client.post("/predict", json={"entity_ids": [1, 2, 3]}).json()["degraded"]
                return found["HeliostatFallbacks"]["state"] == "firing"

            prometheus.until(rings)
            shop.workspace.rollout.serve("churn", 1, reason="back")
        rules = prometheus.alerts()
        assert {rule["health"] for rule in rules.values()} == {"ok"}, rules
        assert {name for name, rule in rules.items() if rule["state"] == "firing"} == {"HeliostatFallbacks"}
        alerts = rules["HeliostatFallbacks"]["alerts"]
        assert {alert["labels"]["model"] for alert in alerts} == {"churn"}  # type: ignore[attr-defined] # JSON
        # What rang nothing did so because of its numbers, not for want of them.
        expressions = " ".join(rule["expr"] for rule in _written())
        for name in set(re.findall(r"ray_heliostat_\w+", expressions)):
            found = prometheus.ask("query", query=name)["result"]
            assert found, name
            assert all("replica" in series["metric"] for series in found), name  # type: ignore[operator] # JSON
    finally:
        prometheus.stop()


def _written() -> list[dict[str, str]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
