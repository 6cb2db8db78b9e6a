"""Bring feature views' history from the event log into the online rings.

    python jobs/materialize_features.py --view purchase_history
    python jobs/materialize_features.py --rebuild
    ray job submit --working-dir . -- python jobs/materialize_features.py

Run it after events were ingested in bulk, after a view was added or changed, and regularly: it looks
only at entities with new events, and once a day (`materialization.full_every`) at all of them. It may
run beside live ingestion, and again; killed, it goes on where it was. After the online server's data
were lost, --rebuild restores everything. What is small it does itself, the rest on Ray. Exit codes:
docs/operations.md.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from heliostat.cli import ConfigOption, HomeOption, run_job, shell_settings
from heliostat.errors import InvalidValueError
from heliostat.rebuild import materialize_views, past_instant_us, rebuild, shown
from heliostat.workspace import Workspace


def main(
    view: Annotated[list[str] | None, typer.Option(help="Feature view; may be repeated. Default: all.")] = None,
    as_of: Annotated[str | None, typer.Option(help="Only events before this instant, UTC; default: now.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Look at all entities, also where nothing is new.")] = False,
    everything: Annotated[
        bool, typer.Option("--rebuild", help="Restore all online state: rings, routes, cached predictions.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
) -> None:
    """Bring feature views' history from the event log into the online rings."""
    settings = shell_settings(config, home)
    if everything and (view or as_of):
        raise InvalidValueError("--rebuild", "with --view or --as-of", "nothing beside it: it restores all there is")
    with Workspace.open(settings) as workspace, shown() as step:
        views = None if not view else [workspace.definitions.view(name) for name in view]
        as_of_us = past_instant_us(workspace, as_of)
        if everything:
            rebuilt = rebuild(workspace, on_step=step)
            print(json.dumps(rebuilt.describe()) if as_json else rebuilt)
            return
        done = materialize_views(workspace, views, as_of_us=as_of_us, full=full, on_step=step)
    for each in done:
        print(json.dumps(each.describe()) if as_json else each)


if __name__ == "__main__":
    run_job(main)
