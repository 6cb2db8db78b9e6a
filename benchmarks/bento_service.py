"""BentoML's side of `benchmarks/scoring_servers.py`: a service of one batchable method.

    MODEL=model.txt bentoml serve bento_service:Scorer

One worker, adaptive batching: a batch may hold what 64 connections send, 100 rows each, and wait no longer than a
request of Heliostat's may take. It imports nothing of Heliostat.
"""

import os

import bentoml
import lightgbm
import numpy as np


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Scorer:
    """The model."""

    def __init__(self) -> None:
        self._booster = lightgbm.Booster(model_file=os.environ["MODEL"])

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=6_400, max_latency_ms=1_000)
    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Scores of rows, shape ``(n, n_features)``."""
        return self._booster.predict(rows, num_threads=1)
