"""Bring feature views' history from the event log into the online rings.

    python jobs/materialize_features.py --view purchase_history --as-of 1998-07-01

Run it after events were ingested in bulk, after a view was added or changed, and regularly:
it repairs whatever live updates have missed. It may run beside live ingestion, and again.
Exit codes: docs/operations.md.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from heliostat import cluster
from heliostat.cli import ConfigOption, HomeOption, run_job, shell_settings
from heliostat.clock import format_instant, parse_instant_us
from heliostat.errors import InvalidValueError
from heliostat.features.materialize import materialize
from heliostat.features.tiles import RingLimits
from heliostat.storage.online_store import OnlineConfig
from heliostat.workspace import Workspace


def main(
    view: Annotated[list[str] | None, typer.Option(help="Feature view; may be repeated. Default: all.")] = None,
    as_of: Annotated[str | None, typer.Option(help="Only events before this instant, UTC; default: now.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
) -> None:
    """Bring feature views' history from the event log into the online rings."""
    settings = shell_settings(config, home)
    with Workspace.open(settings) as workspace:
        views = [workspace.definitions.view(name) for name in view or workspace.definitions.views]
        now_us = workspace.clock.now_us()
        as_of_us = now_us if as_of is None else parse_instant_us(as_of)
        if as_of_us > now_us:
            raise InvalidValueError("--as-of", str(as_of), f"an instant up to now, {format_instant(now_us)}")
        with cluster.connect(workspace.settings):
            done = materialize(
                views,
                event_log=workspace.event_log,
                online=OnlineConfig.of(workspace.settings),
                as_of_us=as_of_us,
                limits=RingLimits.of(settings.ingestion),
            )
    for each in done:
        if as_json:
            print(json.dumps(each.describe()))
        else:
            print(
                f"{', '.join(each.views)}: {each.events:,} events of {each.entities:,} entities, as of "
                f"{format_instant(each.as_of_us)}; rings: {each.rings.written:,} written, "
                f"{each.rings.unchanged:,} unchanged, {each.rings.ahead:,} ahead"
            )


if __name__ == "__main__":
    run_job(main)
