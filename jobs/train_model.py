"""Train a model: training set, search, final fit, evaluation, gate, registration, perhaps promotion.

    python jobs/train_model.py --model churn --promote
    python jobs/train_model.py --instants 1997-07-01,1997-10-01 --validation 1998-01-01 --trials 0
    python jobs/train_model.py --model fraud --spine transactions.parquet

A model that takes inputs of the request is trained on a spine: a Parquet or CSV file with the entity's key
columns, as_of and a column for each input.

The candidate is registered whatever the gate says. Exit codes: 0 done; 5 the gate refused a candidate that
was to be promoted, or somebody else moved the alias; others as for every job (docs/operations.md).
"""

from __future__ import annotations

import json
import logging
from typing import Annotated

import typer

from heliostat import cluster
from heliostat.cli import ConfigOption, HomeOption, run_job, shell_settings
from heliostat.clock import parse_instant_us
from heliostat.errors import ConflictError
from heliostat.models.spine import read_spine
from heliostat.training.trainer import train
from heliostat.workspace import Workspace


def main(
    model: Annotated[str | None, typer.Option(help="Model; needed if several are declared.")] = None,
    instants: Annotated[
        str, typer.Option(help="Training instants, separated by commas. Default: training.instants.")
    ] = "",
    validation: Annotated[
        str, typer.Option(help="Validation instants. Default: training.validation_instants, or the last instant.")
    ] = "",
    spine: Annotated[
        str | None, typer.Option(help="File of rows to train on: key columns, as_of and the request's inputs.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Parameter sets. Default: training.trials.", min=0)] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Promote it if the gate lets it through.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
) -> int:
    """Train a model, judge it, and register it. Exit code 5: it was to be promoted and wasn't let through."""
    settings = shell_settings(config, home)
    if trials is not None:
        settings = settings.model_copy(update={"training": settings.training.model_copy(update={"trials": trials})})
    with Workspace.open(settings) as workspace:
        spec = workspace.definitions.model(model)
        with cluster.connect(workspace.settings):
            report = train(
                workspace,
                spec,
                instants_us=_instants(instants),
                validation_us=_instants(validation),
                spine=None if spine is None else read_spine(spine),
                promote=promote,
                progress=logging.getLogger("heliostat.train").info,
            )
    print(json.dumps(report.as_dict(), indent=2) if as_json else "\n".join(report.lines()))
    return 0 if report.promoted or not promote else ConflictError.exit_code


def _instants(text: str) -> list[int]:
    return [parse_instant_us(each.strip()) for each in text.split(",") if each.strip()]


if __name__ == "__main__":
    run_job(main)
