"""Keep feature snapshots of all entities in the offline store, a day at a time.

    python jobs/compute_features.py --view purchase_history --from 1998-06-01 --to 1998-06-30

A day's snapshot is as of its first instant, 00:00 UTC, and holds every entity with an event
before it. A day that is there already is replaced. Exit codes: docs/operations.md.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from heliostat import cluster
from heliostat.cli import ConfigOption, HomeOption, run_job, shell_settings
from heliostat.clock import US_PER_DAY, format_instant, parse_instant_us
from heliostat.errors import InvalidValueError
from heliostat.features.point_in_time import snapshot
from heliostat.features.windows import floor_to
from heliostat.workspace import Workspace


def main(
    view: Annotated[list[str] | None, typer.Option(help="Feature view; may be repeated. Default: all.")] = None,
    day: Annotated[list[str] | None, typer.Option(help="Day, UTC; may be repeated. Default: today.")] = None,
    first: Annotated[str | None, typer.Option("--from", help="First of several days.")] = None,
    last: Annotated[str | None, typer.Option("--to", help="Last of them; default: today.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
) -> None:
    """Keep feature snapshots of all entities in the offline store, a day at a time."""
    settings = shell_settings(config, home)
    with Workspace.open(settings) as workspace:
        views = [workspace.definitions.view(name) for name in view or workspace.definitions.views]
        days_us = chosen_days_us(day or [], first, last, now_us=workspace.clock.now_us())
        with cluster.connect(settings):
            for each in views:
                for day_us in days_us:
                    rows = snapshot(each, workspace.event_log, as_of_us=day_us)
                    version = workspace.offline_store.write_day(each.ref, day_us, rows)
                    done = {"view": each.ref, "as_of": format_instant(day_us), "rows": rows.num_rows}
                    if as_json:
                        print(json.dumps({**done, "version": version}))
                    else:
                        print(f"{each.ref}: {rows.num_rows:,} entities as of {format_instant(day_us)}")


def chosen_days_us(days: list[str], first: str | None, last: str | None, *, now_us: int) -> list[int]:
    """The first instants of the days asked for, ascending, each once.

    Args:
        days: Single days.
        first: First of a range of days.
        last: Last of it; None: today.
        now_us: The present.

    Raises:
        InvalidValueError: If a day can't be read, hasn't begun, or the range has no beginning or ends before it.
    """
    today_us = floor_to(now_us, US_PER_DAY)
    chosen = {floor_to(parse_instant_us(day), US_PER_DAY) for day in days}
    if last is not None and first is None:
        raise InvalidValueError("--to", last, "a --from with it")
    if first is not None:
        first_us = floor_to(parse_instant_us(first), US_PER_DAY)
        last_us = today_us if last is None else floor_to(parse_instant_us(last), US_PER_DAY)
        if last_us < first_us:
            raise InvalidValueError("--to", last or "today", f"a day not before --from {first}")
        chosen.update(range(first_us, last_us + 1, US_PER_DAY))
    chosen = chosen or {today_us}
    if max(chosen) > now_us:
        raise InvalidValueError(
            "day", format_instant(max(chosen)), f"a day that has begun by {format_instant(now_us)}"
        )
    return sorted(chosen)


if __name__ == "__main__":
    run_job(main)
