"""What a user would first write: FastAPI, a hash of features an entity in Redis, a LightGBM model.

    python benchmarks/plain_server.py --redis unix:///… --model model.txt --features features.json --port 9001

The peer of `benchmarks/serving.py`; it imports nothing of Heliostat. It asks for one entity after the
other, as one writes it first; with ``--pipelined`` for all of them in one pipeline, as one writes it when
that has turned out to be slow. Either is written well otherwise: a client that parses in C, a model on one
thread, uvicorn on uvloop. It has no experiment, no prediction log, no fallback, and its features are as
old as the job that wrote them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lightgbm
import numpy as np
import redis.asyncio
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel


class PredictRequest(BaseModel):
    """Whom to predict for."""

    entity_ids: list[int]


class PredictAnswer(BaseModel):
    """The predictions, in the request's order."""

    predictions: list[float]


def make_app(
    store: redis.asyncio.Redis, prefix: str, booster: lightgbm.Booster, features: list[str], *, pipelined: bool
) -> FastAPI:
    """The application.

    Args:
        store: Holds ``{prefix}{entity}``: a hash of feature values as text.
        prefix: Of the keys.
        booster: The model.
        features: Fields of the hash, in the order of the model's columns.
        pipelined: Whether a request's HMGETs share a pipeline.
    """
    app = FastAPI()

    async def looked_up(entities: list[int]) -> list[list[bytes | None]]:
        if not pipelined:
            return [await store.hmget(f"{prefix}{entity}", features) for entity in entities]
        async with store.pipeline(transaction=False) as pipeline:
            for entity in entities:
                pipeline.hmget(f"{prefix}{entity}", features)
            return await pipeline.execute()

    @app.post("/predict")
    async def predict(request: PredictRequest) -> PredictAnswer:
        rows = await looked_up(request.entity_ids)
        matrix = np.array([[np.nan if value is None else float(value) for value in row] for row in rows])
        return PredictAnswer(predictions=booster.predict(matrix, num_threads=1).tolist())

    return app


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis", required=True, help="redis:// or unix:// address")
    parser.add_argument("--prefix", required=True, help="of the hashes' keys")
    parser.add_argument("--model", type=Path, required=True, help="LightGBM's text")
    parser.add_argument("--features", type=Path, required=True, help="JSON list of the hash's fields")
    parser.add_argument("--pipelined", action="store_true", help="a request's HMGETs share a pipeline")
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    app = make_app(
        redis.asyncio.from_url(given.redis),
        given.prefix,
        lightgbm.Booster(model_file=str(given.model)),
        json.loads(given.features.read_text()),
        pipelined=given.pipelined,
    )
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning", loop="uvloop", http="httptools")


if __name__ == "__main__":
    main()
