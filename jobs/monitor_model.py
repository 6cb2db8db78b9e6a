"""Look at a model version: drift, performance, quality, parity; keep the verdicts.

    python jobs/monitor_model.py --check drift --check quality

Exit codes: 0 nothing to see (also when there are too few rows to say anything: see --strict);
10 a check warns or alarms; others as for every job (docs/operations.md).
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from heliostat.cli import ConfigOption, HomeOption, run_job, shell_settings
from heliostat.clock import parse_duration_us, parse_instant_us
from heliostat.monitoring.checks import run_checks
from heliostat.monitoring.verdict import CHECKS, exit_code, overall
from heliostat.workspace import Workspace


def main(
    check: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(CHECKS)}; may be repeated. Default: all.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model; needed if several are declared.")] = None,
    version: Annotated[str, typer.Option(help="A number, an alias, or latest.")] = "production",
    until: Annotated[str | None, typer.Option(help="Where the stretch ends, UTC; default: now.")] = None,
    window: Annotated[str | None, typer.Option(help="How far it reaches back; default: monitoring.window.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A check with too few rows exits with 10 as well.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.")] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
) -> int:
    """Look at a model version, print what was found and keep it. Exit code 10: a check warns or alarms."""
    settings = shell_settings(config, home)
    with Workspace.open(settings) as workspace:
        verdicts = run_checks(
            workspace,
            settings,
            check or CHECKS,
            model=model,
            version=version,
            until_us=None if until is None else parse_instant_us(until),
            window_us=None if window is None else parse_duration_us(window),
        )
    code = exit_code(verdicts, strict=strict)
    if as_json:
        status = overall(verdicts).value
        print(json.dumps({"status": status, "verdicts": [each.to_dict() for each in verdicts]}, indent=2))
    else:
        print("\n".join(line for each in verdicts for line in each.lines()))
    return code


if __name__ == "__main__":
    run_job(main)
