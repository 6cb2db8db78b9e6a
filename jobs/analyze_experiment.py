"""Analyse a split: predictions joined with what became of the entities.

    python jobs/analyze_experiment.py --experiment spring

The interval is always valid: look as often as you like. It is kept among the catalog's verdicts.
Exit codes: 0 analysed, whatever it shows; 10 the split itself is broken (sample-ratio mismatch);
others as for every job (docs/operations.md).
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from heliostat.cli import ConfigOption, HomeOption, run_job, shell_settings
from heliostat.monitoring.exposures import analyze_split, record_report
from heliostat.monitoring.verdict import ATTENTION_EXIT_CODE
from heliostat.workspace import Workspace


def main(
    experiment: Annotated[str | None, typer.Option(help="The split's name; default: the newest.")] = None,
    model: Annotated[str | None, typer.Option(help="Model; needed if several are declared.")] = None,
    planned_entities: Annotated[
        int | None, typer.Option(help="Entities in both arms at which the interval is tightest.", min=2)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
) -> int:
    """Compare a split's variants by what became of the entities. Exit code 10: the split is broken."""
    settings = shell_settings(config, home)
    with Workspace.open(settings) as workspace:
        report = analyze_split(
            workspace, settings, model=model, experiment=experiment, planned_entities=planned_entities
        )
        record_report(workspace, report)
    print(json.dumps(report.to_dict(), indent=2) if as_json else "\n".join(report.lines()))
    broken = any(each.split.mismatch for each in report.analyses)
    return ATTENTION_EXIT_CODE if broken else 0


if __name__ == "__main__":
    run_job(main)
