"""What every shell shares: its options, its settings, its output, and how it ends with an honest exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import orjson
import typer
from rich.console import Console
from rich.table import Table

from heliostat.errors import HeliostatError
from heliostat.settings import API_KEY, PREFIX, Settings, load_settings
from heliostat.telemetry import configure_logging

ConfigOption = Annotated[
    list[Path] | None,
    typer.Option("--config", help="Settings file over configs/base.yaml; may be repeated.", show_default=False),
]
HomeOption = Annotated[Path | None, typer.Option("--home", help="Folder of everything local.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, in a sentence; it is kept.")]

INTERRUPTED = 130
ALARM = 10

console = Console()


def shell_settings(config: Sequence[Path] | None = None, home: Path | None = None) -> Settings:
    """The settings of a shell, with logging set up; relative paths start where the command was run.

    Raises:
        HeliostatError: If a file, key, variable or value can't be used.
    """
    settings = load_settings(config or (), environ=os.environ, home=home)
    configure_logging(settings.telemetry)
    return settings


def api_key_headers() -> dict[str, str]:
    """Headers of a shell's own requests to the inference graph: the API key of the environment, if there is one."""
    key = os.environ.get(f"{PREFIX}{API_KEY}")
    return {"Authorization": f"Bearer {key}"} if key else {}


def run_job(main: Callable[..., int | None]) -> NoReturn:
    """Run a job's main function as a command, and end the process with an honest exit code.

    The function's parameters become options (as Typer reads them). It returns an exit code or
    None for 0. Exit codes: 0 done; 1 a fault of ours; 2 wrong usage, settings or definitions;
    3 wrong data; 4 not found; 5 refused (a gate, a conflict); 6 storage; 10 an alarm;
    20 retraining is due; 130 interrupted.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    sys.exit(run(app))


def run(app: typer.Typer) -> int:
    """Run a command and tell its exit code; an error of ours is said in one line."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last line of a shell
        return _exit_code(error)
    return code if isinstance(code, int) else 0


def _exit_code(error: BaseException) -> int:
    """Say what went wrong: an error of ours, also one that Ray wrapped; wrong usage; or a fault."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HeliostatError):
            print(f"error: {seen}", file=sys.stderr)  # noqa: T201 - the command line speaks
            return seen.exit_code
        seen = getattr(seen, "cause", None) or seen.__cause__
    show = getattr(error, "show", None)
    if callable(show):
        show(file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ in ("Abort", "Exit"):
        return int(getattr(error, "exit_code", INTERRUPTED))
    logging.getLogger("heliostat").error("unexpected error", exc_info=error)
    return 1


def print_json(document: object) -> None:
    """A document on standard output, for scripts."""
    sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table for people."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)
