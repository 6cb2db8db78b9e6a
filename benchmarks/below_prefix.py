"""The graph a second time on the same Serve, with other settings, below a prefix: so that both can take turns."""

from __future__ import annotations

from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.graph import Gateway
from deployments.stages import waiting_limit
from heliostat.settings import Settings


class Root:
    """An application below a prefix that believes itself to be at the root, as the first one is.

    Args:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take the prefix away."""
        if scope["type"] == "http":
            scope["path"], scope["root_path"] = scope["path"].removeprefix(scope["root_path"]), ""
        await self._app(scope, receive, send)


class PrefixedGateway(Gateway):  # type: ignore[misc,valid-type] # Serve's decorator made a class of it
    """The gateway below a prefix."""

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The same application."""
        return Root(super().__serve_build_asgi_app__())


def deploy(url: str, settings: Settings, name: str) -> str:
    """Deploy it, fused, beside the graph; gives its address.

    Args:
        url: Of the Serve that runs.
        settings: Its own.
        name: The application's, and its prefix.
    """
    serving = settings.serving
    deployment = serve.deployment(
        PrefixedGateway,
        name="Gateway",
        num_replicas=serving.replicas,
        max_ongoing_requests=serving.max_ongoing_requests + waiting_limit(settings),
        max_queued_requests=serving.max_queued_requests,
        ray_actor_options={"num_cpus": 0.1},
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    serve.run(deployment.bind(settings), name=name, route_prefix=f"/{name}")
    return f"{url}/{name}"
