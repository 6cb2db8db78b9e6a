"""Decide whether a model is to be trained again, and do it.

    python jobs/retrain_model.py --decide
    python jobs/retrain_model.py --run

Exit codes: 0 nothing is due, or it was done; 20 due (with --decide); 5 the gate refused the
candidate, or a split is running; others as for every job (docs/operations.md).
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from heliostat import cluster
from heliostat.cli import ConfigOption, HomeOption, run_job, shell_settings
from heliostat.retraining import decide, retrain, state_of
from heliostat.workspace import Workspace


def main(
    run: Annotated[
        bool, typer.Option("--run/--decide", help="Train if it is due, or only say whether it is.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="With --run: train even if nothing is due.")] = False,
    challenger: Annotated[
        float | None,
        typer.Option(help="Let it serve this share in a split, instead of promoting it.", min=0.01, max=0.99),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model; needed if several are declared.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision, or what was done, as JSON.")] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
) -> int:
    """Decide whether a model is to be trained again (exit code 20: it is), or with --run do it."""
    settings = shell_settings(config, home)
    with Workspace.open(settings) as workspace:
        spec = workspace.definitions.model(model)
        decision = decide(state_of(workspace, spec.name), settings.retraining, now_us=workspace.clock.now_us())
        if not (run and (decision.due or force)):
            print(json.dumps(decision.to_dict(), indent=2) if as_json else "\n".join(decision.lines()))
            return 0 if run else decision.exit_code
        with cluster.connect(workspace.settings):
            done = retrain(
                workspace,
                decision,
                challenger_weight=challenger,
                progress=lambda stage: print(f"{stage} …", file=sys.stderr, flush=True),
            )
    print(json.dumps(done.to_dict(), indent=2) if as_json else "\n".join(done.lines()))
    return done.exit_code


if __name__ == "__main__":
    run_job(main)
