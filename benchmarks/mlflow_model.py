"""MLflow's side of `benchmarks/scoring_servers.py`: the model as a folder that ``mlflow models serve`` takes.

    python mlflow_model.py model.txt folder

With a signature, as MLflow's documentation wants it. It imports nothing of Heliostat.
"""

import sys

import lightgbm
import mlflow.lightgbm
import numpy as np
from mlflow.models import infer_signature


def main() -> None:
    """Run as a program."""
    model, folder = sys.argv[1:]
    booster = lightgbm.Booster(model_file=model)
    rows = np.zeros((2, booster.num_feature()))
    mlflow.lightgbm.save_model(booster, folder, signature=infer_signature(rows, booster.predict(rows)))


if __name__ == "__main__":
    main()
