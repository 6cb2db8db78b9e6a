"""The least that Ray Serve and FastAPI can do: one route, a constant, the graph's own deployment settings.

What the graph reaches beside it is what is left after Serve, HAProxy and FastAPI have taken their part.
"""

from __future__ import annotations

from fastapi import FastAPI
from ray import serve
from ray.serve.schema import LoggingConfig

from heliostat.settings import Settings

PREFIX = "/bare"

app = FastAPI()


@serve.ingress(app)
class Bare:
    """The constant."""

    @app.post("/predict")
    async def predict(self) -> dict[str, list[float]]:
        """Always the same."""
        return {"predictions": [0.5]}


def deploy(url: str, settings: Settings) -> str:
    """Deploy it beside the graph; gives its address.

    Args:
        url: Of the Serve that runs.
        settings: The graph's.
    """
    deployment = serve.deployment(
        Bare,
        name="Bare",
        num_replicas=settings.serving.replicas,
        max_ongoing_requests=settings.serving.max_ongoing_requests,
        ray_actor_options={"num_cpus": 0.1},
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    serve.run(deployment.bind(), name="bare", route_prefix=PREFIX)
    return f"{url}{PREFIX}"
