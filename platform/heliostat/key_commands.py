"""Commands for API keys: `heliostat keys create`, `list` and `revoke`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from heliostat.clock import SystemClock, format_instant, parse_duration_us
from heliostat.serving.keys import KeyBook, works
from heliostat.shell import ConfigOption, HomeOption, JsonOption, console, print_json, print_table, shell_settings
from heliostat.storage.catalog_tables import ApiKeyRow
from heliostat.workspace import Workspace

keys_app = typer.Typer(help="API keys of the inference graph.", no_args_is_help=True)


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    scope: Annotated[
        list[str], typer.Option("--scope", help="read, predict, ingest or admin (all of them); may be repeated.")
    ],
    expires: Annotated[str | None, typer.Option("--expires", help="After how long: 90d. Default: never.")] = None,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an API key. It is shown this once; only a hash of it is kept."""
    lasts_us = None if expires is None else parse_duration_us(expires)
    settings = shell_settings(config, home)
    with Workspace.open(settings) as workspace:
        made = KeyBook.of(workspace).create(name, scope, lasts_us=lasts_us)
    if as_json:
        print_json({"name": name, "id": made.id, "key": made.key})
        return
    print(made.key)  # noqa: T201 - alone on standard output, so that a script can take it
    within = f"works within {settings.serving.keys_within_s:g} s, and isn't shown again"
    wanted = "" if settings.serving.access == "keys" else "; none is asked for while serving.access is loopback"
    typer.echo(f"key {name!r}: {within}{wanted}", err=True)


@keys_app.command("list")
def keys_list(config: ConfigOption = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """All API keys there ever were: whose, what they allow, and until when; never the keys."""
    with Workspace.open(shell_settings(config, home)) as workspace:
        found = KeyBook.of(workspace).list()
    now_us = SystemClock().now_us()
    if as_json:
        print_json([_document(each, now_us) for each in found])
        return
    columns = ("name", "state", "scopes", "ends in", "created", "expires", "revoked")
    rows = [
        (
            each.name,
            _state(each, now_us),
            ", ".join(each.scopes),
            f"…{each.last_four}",
            *(
                ("-" if at is None else format_instant(at))
                for at in (each.created_us, each.expires_us, each.revoked_us)
            ),
        )
        for each in found
    ]
    print_table(f"{len(found)} keys", columns, rows)


@keys_app.command("revoke")
def keys_revoke(
    name: Annotated[str, typer.Argument(help="Whose.")], config: ConfigOption = None, home: HomeOption = None
) -> None:
    """Stop a key, in all replicas within serving.keys_within_s."""
    settings = shell_settings(config, home)
    with Workspace.open(settings) as workspace:
        KeyBook.of(workspace).revoke(name)
    console.print(f"{name}: revoked; refused within {settings.serving.keys_within_s:g} s", highlight=False)


def _state(row: ApiKeyRow, now_us: int) -> str:
    return "works" if works(row, now_us) else "revoked" if row.revoked_us is not None else "expired"


def _document(row: ApiKeyRow, now_us: int) -> dict[str, Any]:
    instants = {"created": row.created_us, "expires": row.expires_us, "revoked": row.revoked_us}
    return {
        "name": row.name,
        "id": row.id,
        "state": _state(row, now_us),
        "scopes": list(row.scopes),
        "last_four": row.last_four,
        **{name: None if at is None else format_instant(at) for name, at in instants.items()},
    }
