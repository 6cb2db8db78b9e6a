"""Commands that take data away: `heliostat prune` and `heliostat forget`."""

from __future__ import annotations

from typing import Annotated

import typer

from heliostat.clock import parse_duration_us
from heliostat.errors import UnknownEntityError
from heliostat.forgetting import forget
from heliostat.retention import prune
from heliostat.shell import ConfigOption, HomeOption, JsonOption, console, print_json, shell_settings
from heliostat.workspace import Workspace


def prune_events(
    keep: Annotated[
        str | None, typer.Option("--keep", help="How far back events are kept; default: storage.retention.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also events that a declaration still needs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Drop old days from the event log, unless a window, a training instant or a lifetime feature needs them."""
    with Workspace.open(shell_settings(config, home)) as workspace:
        report = prune(
            workspace, keep_us=None if keep is None else parse_duration_us(keep), force=force, dry_run=dry_run
        )
    if as_json:
        print_json(report.to_document())
    else:
        console.print("\n".join(report.lines()), highlight=False)


def forget_entity(
    entity: Annotated[str, typer.Argument(help="The entity's name, as declared.")],
    key: Annotated[str, typer.Argument(help="Its key; several columns are joined by |.")],
    exclusive: Annotated[
        bool, typer.Option("--exclusive", help="Nothing else writes now: uncommitted files go as well.")
    ] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> int:
    """Erase everything about one entity, everywhere; repeating it changes nothing."""
    with Workspace.open(shell_settings(config, home)) as workspace:
        entities = workspace.definitions.entities
        if entity not in entities:
            raise UnknownEntityError(entity, tuple(entities))
        report = forget(workspace, entities[entity], key, exclusive=exclusive)
    if as_json:
        print_json(report.to_document())
    else:
        console.print("\n".join(report.lines()), highlight=False)
    return report.exit_code
