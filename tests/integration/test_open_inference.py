"""The Open Inference Protocol, spoken by a stock client that knows nothing of us."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from heliostat.settings import OnlineSettings, Settings
from heliostat.storage.stream_entries import rows_from
from heliostat.workspace import Workspace
from tests.integration.test_client import Gateway
from tests.integration.test_serving import purchase, register


@pytest.fixture
def workspace(settings: Settings) -> Iterator[Workspace]:
    with Workspace.open(settings) as opened:
        register(opened, 1)
        register(opened, 2)
        opened.rollout.serve("churn", 1, reason="the first one")
        yield opened


@pytest.fixture
def gateway(workspace: Workspace) -> Iterator[Gateway]:
    serving = workspace.settings.serving.model_copy(update={"deadline_ms": 20_000.0})
    with Gateway(workspace.settings.model_copy(update={"serving": serving})) as found:
        yield found


@pytest.fixture
def client(gateway: Gateway) -> Iterator[triton.InferenceServerClient]:
    found = triton.InferenceServerClient(f"127.0.0.1:{gateway.port}", network_timeout=60.0)
    yield found
    found.close()


@pytest.fixture
def plain(gateway: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{gateway.port}", timeout=60) as found:
        yield found


def tensor(name: str, values: list[Any], dtype: Any, *, binary: bool = True) -> triton.InferInput:
    array = np.array(values, dtype=dtype)
    made = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    return made.set_data_from_numpy(array, binary_data=binary)


def test_a_stock_client_finds_what_is_there(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("churn")
    assert client.is_model_ready("churn", "1")
    assert not client.is_model_ready("churn", "2")
    assert not client.is_model_ready("nope")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    model = client.get_model_metadata("churn")
    assert (model["versions"], model["inputs"]) == (
        ["1"],
        [{"name": "entity_id", "datatype": "INT64", "shape": [-1]}],
    )
    assert client.get_model_metadata("churn", "1") == model


@pytest.mark.parametrize("binary", [True, False])
def test_a_stock_client_gets_the_predictions_of_post_predict_and_they_are_logged(
    client: triton.InferenceServerClient, plain: httpx.Client, workspace: Workspace, binary: bool
) -> None:
    events = [purchase(number, 1 + number % 3, "1998-06-20") for number in range(9)]
    assert plain.post("/events", json={"source": "purchases", "events": events}).json()["accepted"] == 9
    given: list[dict[str, float | None]] = [{"count_30d": 2.5}, {"count_30d": 3.5}]
    asked = [
        tensor("entity_id", [1, 2], np.int64, binary=binary),
        tensor("count_30d", [[2.5], [3.5]], np.float32, binary=binary),
    ]
    if binary:  # JSON has no NaN
        asked.append(tensor("recent_purchases__amount_90d", [np.nan, 7.0], np.float64))
        given[0]["recent_purchases__amount_90d"], given[1]["recent_purchases__amount_90d"] = None, 7.0
    wanted = plain.post("/predict", json={"entity_ids": [1, 2], "features": given}).json()
    found = client.infer("churn", asked, request_id="mine")
    assert found.as_numpy("prediction").tolist() == wanted["predictions"]
    assert found.as_numpy("model_version").tolist() == [1, 1]
    assert found.as_numpy("variant").tolist() == [b"control", b"control"]
    assert found.as_numpy("fallback").tolist() == [b"", b""]
    said = found.get_response()
    assert (said["id"], said["model_name"], said["parameters"]["logged"]) == ("mine", "churn", True)
    stream = workspace.streams.record_stream("predictions")
    _, rows = rows_from("predictions", workspace.streams.read(stream))["churn"]
    logged = set(rows.column("prediction_id").to_pylist())
    assert {each.decode() for each in found.as_numpy("prediction_id")} < logged


def test_a_stock_client_may_choose_outputs_and_how_they_travel(client: triton.InferenceServerClient) -> None:
    outputs = [
        triton.InferRequestedOutput("prediction", binary_data=False),
        triton.InferRequestedOutput("variant", binary_data=True),
    ]
    ids = tensor("entity_id", [b"1", b"2", b"3"], object)
    found = client.infer("churn", [ids], outputs=outputs)
    assert found.as_numpy("prediction").shape == (3,)
    assert found.as_numpy("variant").tolist() == [b"control"] * 3
    assert found.as_numpy("prediction_id") is None


def test_many_requests_at_once_are_each_answered(gateway: Gateway) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{gateway.port}", network_timeout=60.0, concurrency=8)
    waiting = [client.async_infer("churn", [tensor("entity_id", [number], np.int64)]) for number in range(50)]
    assert all(np.isfinite(each.get_result().as_numpy("prediction")).all() for each in waiting)
    client.close()


def test_a_version_is_answered_by_itself_or_not_at_all(
    client: triton.InferenceServerClient, workspace: Workspace
) -> None:
    ids = [tensor("entity_id", list(range(40)), np.int64)]
    assert set(client.infer("churn", ids, model_version="1").as_numpy("model_version").tolist()) == {1}
    with pytest.raises(InferenceServerException, match="version 2 .* serving: 1") as idle:
        client.infer("churn", ids, model_version="2")
    assert idle.value.status() == "409"
    with pytest.raises(InferenceServerException, match="has no version 3; it has: 1, 2") as unknown:
        client.get_model_metadata("churn", "3")
    assert unknown.value.status() == "404"
    workspace.rollout.start_split("churn", experiment="both", control=1, challenger=2, weight=0.5)
    with pytest.raises(InferenceServerException, match="doesn't answer everybody; serving: 1, 2") as split:
        client.infer("churn", ids, model_version="2")
    assert split.value.status() == "409"
    assert set(client.infer("churn", ids).as_numpy("model_version").tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("model", "name", "dtype", "status", "said"),
    [
        ("nope", "entity_id", np.int64, "404", "churn"),
        ("churn", "customer", np.int64, "400", "a tensor 'entity_id'"),
        ("churn", "entity_id", np.float64, "400", "an integer"),
    ],
)
def test_a_stock_client_is_told_what_is_wrong(
    client: triton.InferenceServerClient, model: str, name: str, dtype: Any, status: str, said: str
) -> None:
    with pytest.raises(InferenceServerException, match=said) as raised:
        client.infer(model, [tensor(name, [1], dtype)])
    assert raised.value.status() == status


def test_compressed_bodies_and_unknown_paths_are_refused_as_the_protocol_has_it(
    client: triton.InferenceServerClient, plain: httpx.Client
) -> None:
    with pytest.raises(InferenceServerException, match="isn't compressed"):
        client.infer("churn", [tensor("entity_id", [1], np.int64)], request_compression_algorithm="gzip")
    for reply in (plain.get("/v2/nope"), plain.get("/v2/models/churn/infer"), plain.get("/v2/models/nope")):
        assert set(reply.json()) == {"error"}
        assert reply.status_code in (404, 405)


def test_without_a_store_the_server_is_alive_and_not_ready(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"online": OnlineSettings(url="redis://127.0.0.1:1/0", timeout_s=0.3)})
    with Workspace.open(settings) as workspace:
        register(workspace, 1)
        workspace.rollout.serve("churn", 1, reason="the first one")
    with Gateway(nowhere) as gateway:
        client = triton.InferenceServerClient(f"127.0.0.1:{gateway.port}")
        assert client.is_server_live()
        assert not client.is_server_ready()
        with pytest.raises(InferenceServerException, match="the prediction log can't be written") as raised:
            client.infer("churn", [tensor("entity_id", [1], np.int64)])
        assert raised.value.status() == "503"
        client.close()
