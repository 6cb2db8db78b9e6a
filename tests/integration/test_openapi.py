"""The OpenAPI document and the real application: examples work, and whatever it allows is answered as it says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from heliostat.settings import ClockSettings, ServingSettings, Settings
from heliostat.workspace import Workspace
from tests.integration.test_client import Gateway
from tests.integration.test_serving import register

METHODS = ("get", "post", "put", "delete", "patch")


@pytest.fixture
def url(settings: Settings) -> Iterator[str]:
    """A gateway whose model serves, at today's time: the examples' events are of this year."""
    now = settings.model_copy(
        update={"clock": ClockSettings(), "serving": ServingSettings(deadline_ms=20_000.0, max_body_bytes=100_000)}
    )
    with Workspace.open(now) as workspace:
        register(workspace, 1)
        workspace.rollout.serve("churn", 1, reason="the first one")
    with Gateway(now) as gateway:
        yield f"http://127.0.0.1:{gateway.port}"


@pytest.fixture
def document(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/openapi.json", timeout=30).json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                yield path, method, item[method]


def check(value: object, schema: dict[str, Any], document: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
    assert [error.message for error in validator.iter_errors(value)] == []


def test_every_route_is_documented_with_its_answers_and_an_example(document: dict[str, Any]) -> None:
    paths = set(document["paths"])
    assert paths >= {
        "/predict",
        "/models/{model}/predict",
        "/events",
        "/actuals",
        "/features",
        "/features/{view}/{entity}",
        "/models",
        "/models/{model}/{version}",
        "/healthz",
        "/readyz",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{name}",
        "/v2/models/{name}/ready",
        "/v2/models/{name}/infer",
        "/v2/models/{name}/versions/{version}",
        "/v2/models/{name}/versions/{version}/ready",
        "/v2/models/{name}/versions/{version}/infer",
    }
    for path, method, operation in operations(document):
        for status, answer in operation["responses"].items():
            assert answer["description"], (path, status)
            for kind, content in answer["content"].items():
                assert "schema" in content, (path, status, kind)
        shown = operation["responses"]["200"]["content"]["application/json"]
        check(shown["example"], shown["schema"], document)
        if method == "post":
            asked = operation["requestBody"]["content"]["application/json"]
            check(asked["example"], asked["schema"], document)
        assert all("example" in each for each in operation.get("parameters", ()) if each["in"] == "path"), path


def test_every_example_is_answered_as_documented(url: str, document: dict[str, Any]) -> None:
    with httpx.Client(base_url=url, timeout=30) as client:
        for path, method, operation in operations(document):
            names = {
                each["name"]: each["example"] for each in operation.get("parameters", ()) if each["in"] == "path"
            }
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
            reply = client.request(method, path.format(**names), json=body)
            assert reply.status_code == 200, (path, reply.text)
            check(reply.json(), operation["responses"]["200"]["content"]["application/json"]["schema"], document)


# Thousands of cases take as long as the machine lets them: this only guards against hanging.
_HANGS_AFTER_S = 1_500


def schemathesis(url: str, folder: Path, *, seed: int, phases: str, examples: int) -> int:
    """Run schemathesis against a server, with schemathesis.toml beside this file; how many cases it sent."""
    config, own = Path(__file__).with_name("schemathesis.toml"), folder / f"{phases} {seed}"
    own.mkdir()
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{url}/openapi.json"]
    command += ["--phases", phases, "--max-examples", str(examples), "--seed", str(seed)]
    # One worker: CPython 3.11 loses count of its recursion when threads build syntax trees, as hypothesis does.
    command += ["--workers", "1", "--continue-on-failure", "--no-shrink", "--suppress-health-check", "all"]
    command += ["--request-timeout", "30", "--no-color"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_HANGS_AFTER_S, cwd=own)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    generated, passed = re.findall(r"(\d+) generated, (\d+) passed", done.stdout)[0]
    assert generated == passed
    return int(generated)


def test_hundreds_of_generated_requests_are_answered_as_documented(url: str, tmp_path: Path) -> None:
    assert schemathesis(url, tmp_path, seed=1, phases="examples,fuzzing", examples=15) > 200


@pytest.mark.slow
@pytest.mark.timeout(_HANGS_AFTER_S + 100)
def test_thousands_of_generated_requests_are_answered_as_documented(url: str, tmp_path: Path) -> None:
    # Two programs side by side: what takes time is making up requests.
    phases = ["examples,coverage,fuzzing", "fuzzing"]
    with ThreadPoolExecutor(len(phases)) as pool:
        sent = [
            pool.submit(schemathesis, url, tmp_path, seed=seed, phases=each, examples=150)
            for seed, each in enumerate(phases)
        ]
        assert sum(each.result() for each in sent) >= 5_000
