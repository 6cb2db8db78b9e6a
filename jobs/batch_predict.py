"""Predict for a model's whole population as of an instant, into a Delta table and a cache.

    python jobs/batch_predict.py --model churn
    python jobs/batch_predict.py --model churn --version 3 --as-of 1998-06-01 --cache-above 0.95
    python jobs/batch_predict.py --model fraud --inputs transactions.parquet
    ray job submit --working-dir . -- python jobs/batch_predict.py --model churn

Running it again for the same instant replaces that instant's rows. Exit codes: docs/operations.md.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from heliostat import cluster
from heliostat.batch import predict_all
from heliostat.cli import ConfigOption, HomeOption, run_job, shell_settings
from heliostat.clock import US_PER_S, parse_duration_us, parse_instant_us
from heliostat.models.spine import read_spine
from heliostat.workspace import Workspace


def main(
    model: Annotated[str | None, typer.Option(help="Model; needed if several are declared.")] = None,
    version: Annotated[str, typer.Option(help="A version's number or an alias.")] = "production",
    as_of: Annotated[str | None, typer.Option(help="Instant of the features, UTC; default: now.")] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="File of rows to predict for: key columns and the request's inputs. Default: the population."
        ),
    ] = None,
    cache_above: Annotated[
        float | None, typer.Option(help="Cache predictions from this score on. Default: batch.cache_above.")
    ] = None,
    cache_ttl: Annotated[str | None, typer.Option(help="For how long, such as 1d. Default: batch.cache_ttl.")] = None,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Whether to cache at all.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
) -> None:
    """Predict for a model's whole population as of an instant, into a Delta table and a cache."""
    settings = shell_settings(config, home)
    above = settings.batch.cache_above if cache_above is None else cache_above
    with Workspace.open(settings) as workspace:
        spec = workspace.definitions.model(model)
        with cluster.connect(workspace.settings):
            report = predict_all(
                workspace,
                spec,
                version=version,
                as_of_us=None if as_of is None else parse_instant_us(as_of),
                cache_above=above if cache else None,
                cache_ttl_s=None if cache_ttl is None else parse_duration_us(cache_ttl) / US_PER_S,
                inputs=None if inputs is None else read_spine(inputs),
            )
    print(json.dumps(report.as_dict()) if as_json else report)


if __name__ == "__main__":
    run_job(main)
