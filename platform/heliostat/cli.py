"""The command line, and how every shell ends: `run_job` turns errors into exit codes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from heliostat.errors import HeliostatError
from heliostat.settings import Settings, load_settings
from heliostat.telemetry import configure_logging

ConfigOption = Annotated[
    list[Path] | None,
    typer.Option("--config", help="Settings file over configs/base.yaml; may be repeated.", show_default=False),
]
HomeOption = Annotated[Path | None, typer.Option("--home", help="Folder of everything local.", show_default=False)]

INTERRUPTED = 130


def shell_settings(config: list[Path] | None = None, home: Path | None = None) -> Settings:
    """The settings of a shell, with logging set up; relative paths start where the command was run.

    Raises:
        HeliostatError: If a file, key, variable or value can't be used.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    settings = load_settings(config or (), environ=os.environ, home=home)
    configure_logging(settings.telemetry)
    return settings


def run_job(main: Callable[..., int | None]) -> NoReturn:
    """Run a job's main function as a command, and end the process with an honest exit code.

    The function's parameters become options (as Typer reads them). It returns an exit code or
    None for 0. Exit codes: 0 done; 1 a fault of ours; 2 wrong usage, settings or definitions;
    3 wrong data; 4 not found; 5 refused (a gate, a conflict); 6 storage; 10 an alarm;
    20 retraining is due; 130 interrupted.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    sys.exit(_run(app))


def _run(app: typer.Typer) -> int:
    try:
        code = app(standalone_mode=False)
    except HeliostatError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the command line speaks
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last line of a shell
        return _foreign(error)
    return code if isinstance(code, int) else 0


def _foreign(error: Exception) -> int:
    """Errors that aren't ours: Ray wraps ours, click's are wrong usage, the rest is a fault."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, HeliostatError):
        print(f"error: {cause}", file=sys.stderr)  # noqa: T201 - the command line speaks
        return cause.exit_code
    show = getattr(error, "show", None)
    if callable(show):
        show(file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ in ("Abort", "Exit"):
        return int(getattr(error, "exit_code", INTERRUPTED))
    logging.getLogger("heliostat").error("unexpected error", exc_info=error)
    return 1
