"""The inference graph on Ray Serve: the same stages, in one replica or each in its own.

    fused         client ─▶ HAProxy ─▶ Gateway [ features ▸ router ▸ model ▸ log ]
    distributed   client ─▶ HAProxy ─▶ Gateway ─▶ FeatureLookup
                                               ├─▶ ABRouter
                                               └─▶ ModelReplica

`build` is what ``serve deploy configs/serve.yaml`` calls; `deploy` and `undeploy` are for
programs that are connected to Ray already.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Iterable
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from deployments.application import build_app
from deployments.http import RETRY_AFTER_S
from deployments.meter import Exporter
from deployments.stages import ABRouterReplica, FeatureLookupReplica, ModelReplica, gateway_parts, waiting_limit
from heliostat.errors import DeploymentFailedError, HeliostatError, UnknownAliasError
from heliostat.ports import free_ports
from heliostat.serving.access import check_ingress
from heliostat.serving.predictor import Predictor
from heliostat.serving.telemetry import Meter
from heliostat.settings import ServingSettings, Settings, load_settings
from heliostat.telemetry import configure_logging
from heliostat.workspace import Workspace

APP_NAME = "heliostat"

# A replica mostly waits; more logical CPUs than a small machine has would keep stages from starting.
_CPUS = 0.1
# New objects until the collector looks at the young ones; and so often until at older ones, and at all.
_COLLECTED_EVERY = (20_000, 20, 50)
# Calls that a stage works on at a time: the gateway's batches, not requests.
_CALLS_A_STAGE = 64
_LOOPBACK = ("127.0.0.1", "localhost")
_ALL_INTERFACES = ("0.0.0.0", "::")  # noqa: S104 - compared with
_PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)

_logger = logging.getLogger("heliostat.gateway")


class GraphArguments(BaseModel):
    """What ``args`` of ``configs/serve.yaml`` may say.

    Attributes:
        config: Settings files over ``configs/base.yaml``.
        placement: Over the settings' ``serving.placement``.
        replicas: Over the settings' ``serving.replicas``.
    """

    model_config = ConfigDict(extra="forbid")

    config: list[str] = []
    placement: Literal["fused", "distributed"] | None = None
    replicas: int | None = None


@serve.ingress()
class Gateway:
    """The ingress: answers HTTP, and holds the stages that weren't given to it.

    A replica that can't reach its store, or can load nothing of what serves, doesn't start, and those of the
    deployment before go on. One model of several that can't be loaded is the ladder's: it keeps no replica from
    answering for the others.

    Args:
        settings: Everything.
        features: Leads to FeatureLookup; None: in this replica.
        router: Leads to ABRouter; None: in this replica.
        runner: Leads to ModelReplica; None: in this replica.
    """

    async def __init__(  # type: ignore[misc] # Serve awaits a constructor that is a coroutine
        self,
        settings: Settings,
        features: DeploymentHandle | None = None,
        router: DeploymentHandle | None = None,
        runner: DeploymentHandle | None = None,
    ) -> None:
        configure_logging(settings.telemetry)
        # Whatever the settings say: a Serve that ran before, or a deploy file, may listen elsewhere.
        listening = await asyncio.to_thread(_listening_host)
        check_ingress(settings.serving.access, listening, "the running Ray Serve")
        workspace = Workspace.open(settings)
        meter = Meter()
        Exporter(meter.board).start()
        self._parts = gateway_parts(workspace, meter, features=features, router=router, runner=runner)
        await self._parts.store.ping()
        await warm_up(self._parts.predictor, self._parts.definitions.models)
        settle_memory()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application: Serve asks for it once the replica is made."""
        return build_app(self._parts)

    async def check_health(self) -> None:
        """Serve replaces a replica that doesn't answer this.

        A store that is down is no reason: a new replica couldn't reach it either, and this one still has
        its ladder. See ``/readyz`` for that.
        """


def settle_memory() -> None:
    """Have the garbage collector leave alone what lives as long as the process, and look at the rest less often.

    A replica holds half a million objects of its libraries; an answer for a hundred entities makes a thousand, which
    are gone with it, without the collector. Its default looks at the young ones every 700, and now and then at all.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTED_EVERY)


async def warm_up(predictor: Predictor, models: Iterable[str]) -> None:
    """Load what serves.

    Raises:
        HeliostatError: If nothing of it can be loaded; why, of the first one.
    """
    loaded, failed = 0, list[HeliostatError]()
    for model in models:
        try:
            await predictor.warm_up(model)
        except UnknownAliasError:
            _logger.warning("no version of model %s serves yet", model)
        except HeliostatError as error:
            _logger.warning("model %s can't be loaded: %s", model, error)
            failed.append(error)
        else:
            loaded += 1
    if failed and not loaded:
        raise failed[0]


def graph(settings: Settings) -> Application:
    """The application for these settings, to be run by Serve.

    Args:
        settings: With the address of the online store in them (`Workspace.settings`).

    Raises:
        UnprotectedIngressError: If other machines would reach it, and it asks for no keys.
    """
    serving = settings.serving
    check_ingress(serving.access, serving.host, "the ingress (serving.host)")
    shared: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": _CPUS},
        "logging_config": _LOGGING,
        "health_check_period_s": 5,
        "health_check_timeout_s": 10,
        "graceful_shutdown_wait_loop_s": 0.2,
        # An upper bound: who has answered all and written the log goes at once.
        "graceful_shutdown_timeout_s": serving.drain_s,
        "max_constructor_retry_count": 3,
        # Old replicas go on until new ones are ready, and stay if those never are.
        "max_surge_percent": 100,
    }
    stages: list[Any] = []
    if serving.placement == "distributed":
        stages = [
            serve.deployment(
                kind,
                name=name,
                max_ongoing_requests=_CALLS_A_STAGE,
                **_scale(serving, serving.autoscaling.target_calls),
                **shared,
            ).bind(settings)
            for name, kind in (
                ("FeatureLookup", FeatureLookupReplica),
                ("ABRouter", ABRouterReplica),
                ("ModelReplica", ModelReplica),
            )
        ]
    gateway = serve.deployment(
        Gateway,
        name="Gateway",
        # Requests wait in the predictor, where they are coalesced and have a deadline, and where too many
        # are refused with a document that says so. What Serve refuses is what gets even past that.
        max_ongoing_requests=serving.max_ongoing_requests + waiting_limit(settings),
        max_queued_requests=serving.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        **_scale(serving, serving.autoscaling.target_requests),
        **shared,
    )
    return gateway.bind(settings, *stages)


def _scale(serving: ServingSettings, target: float) -> dict[str, Any]:
    """How many replicas of a deployment there are: options of ``serve.deployment``."""
    scaling = serving.autoscaling
    if scaling.max_replicas is None:
        return {"num_replicas": serving.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=serving.replicas,
            max_replicas=max(serving.replicas, scaling.max_replicas),
            target_ongoing_requests=target,
            look_back_period_s=scaling.look_back_s,
            upscale_delay_s=scaling.up_after_s,
            downscale_delay_s=scaling.down_after_s,
        )
    }


def build(arguments: GraphArguments) -> Application:
    """The application for a Serve deploy file: ``import_path: deployments.graph:build``.

    Args:
        arguments: The file's ``args``.

    Raises:
        SettingsError: If the settings can't be used.
        UnprotectedIngressError: If other machines would reach it, and it asks for no keys.
    """
    settings = load_settings(arguments.config, environ=os.environ)
    given = arguments.model_dump(exclude={"config"}, exclude_none=True)
    serving = settings.serving.model_copy(update=given)
    with Workspace.open(settings.model_copy(update={"serving": serving})) as workspace:
        return graph(workspace.settings)


def deploy(settings: Settings, *, timeout_s: float = 120.0) -> str:
    """Deploy the graph to the connected Ray cluster, and wait until it answers.

    Args:
        settings: With the address of the online store in them (`Workspace.settings`).
        timeout_s: How long to wait for the first answer, seconds.

    Returns:
        Its base URL: ``http://host:port``.

    Raises:
        UnprotectedIngressError: If other machines would reach it, and it asks for no keys.
        DeploymentFailedError: If it doesn't come up; with Serve's reason.
    """
    serving = settings.serving
    check_ingress(serving.access, serving.host, "the ingress (serving.host)")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if _get_global_client(raise_if_no_controller_running=False) is None:
        serve.start(
            http_options=HTTPOptions(host=serving.host, port=serving.port or free_ports(serving.host, 1)[0]),
            controller_options={"runtime_env": {"env_vars": _own_ports(serving.host)}},
            logging_config=_LOGGING,
        )
    check_ingress(serving.access, _listening_host(), "the running Ray Serve")
    try:
        serve.run(graph(settings), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise DeploymentFailedError(APP_NAME, _reason(error)) from error
    # A Serve that ran already has its port, whatever was asked for; nothing public tells which that is.
    ingress = _get_global_client().http_config
    url = f"http://{'127.0.0.1' if ingress.host in _ALL_INTERFACES else ingress.host}:{ingress.port}"
    wait_for(f"{url}/healthz", timeout_s)
    return url


def _listening_host() -> str | None:
    """Where Serve's ingress listens, and every replica with it; nothing public tells."""
    host: str | None = _get_global_client().http_config.host
    return host


def drain() -> bool:
    """Take the graph away in order: its replicas answer what they began and write their log. Whether it ran."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    runs = _get_global_client(raise_if_no_controller_running=False) is not None
    if not runs or APP_NAME not in serve.status().applications:
        return False
    serve.delete(APP_NAME)
    return True


def undeploy() -> None:
    """Stop the graph in order, and Serve if it runs nothing else."""
    drain()
    if not serve.status().applications:
        serve.shutdown()


def _reason(error: RuntimeError) -> str:
    """Why the application isn't running: our own error if there is one in what Serve says, else all of that."""
    found = serve.status().applications.get(APP_NAME)
    told = [str(error)] if found is None else [found.message, *(each.message for each in found.deployments.values())]
    lines = [line.strip() for text in told for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("heliostat.errors.")]
    return ours[-1].partition(": ")[2] if ours else " ".join(lines)


def wait_for(url: str, timeout_s: float) -> None:
    """Wait until a graph answers: the ingress learns of its replicas a moment after Serve says that they run.

    Args:
        url: Of a route that answers 200.
        timeout_s: How long at most, seconds.

    Raises:
        DeploymentFailedError: If it doesn't until then; with what came last.
    """
    limit = time.monotonic() + timeout_s
    last = "no answer"
    while time.monotonic() < limit:
        try:
            answer = httpx.get(url, timeout=2.0)
            if answer.status_code == 200:
                return
            last = f"status {answer.status_code}"
        except httpx.HTTPError as error:
            last = str(error)
        time.sleep(0.05)
    raise DeploymentFailedError(APP_NAME, f"{url} doesn't answer: {last}")


def _own_ports(host: str) -> dict[str, str]:
    """Ports of the ingress beside the one for requests, so that a machine can have several ingresses.

    Only where the ingress is this machine's alone: on a cluster they are what Prometheus and firewalls
    were told. What the environment says already is kept.
    """
    if host not in _LOOPBACK:
        return {}
    names = [name for name in _PORTS if name not in os.environ]
    return {name: str(port) for name, port in zip(names, free_ports(host, len(names)), strict=True)}
