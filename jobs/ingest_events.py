"""Take files of events into the event log; repeating it changes nothing.

    python jobs/ingest_events.py --source purchases data/purchases/ more.csv

Parquet and CSV files, or folders of them. Rows that don't fit are kept as dead letters, with the
reason. Exit codes: 0 done; 3 a file or every row doesn't fit; others as for every job
(docs/operations.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli import ConfigOption, HomeOption, run_job, shell_settings
from heliostat.errors import DataError
from heliostat.ingestion.intake import ingest_files
from heliostat.workspace import Workspace


def main(
    paths: Annotated[list[Path], typer.Argument(help="Parquet or CSV files, or folders of them.")],
    source: Annotated[str, typer.Option(help="The event source that they are of.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
) -> int:
    """Take files of events into the event log; repeating it changes nothing."""
    with Workspace.open(shell_settings(config, home)) as workspace:
        report = ingest_files(paths, workspace.definitions.source(source), workspace=workspace)
    print(json.dumps(report.to_document(), indent=2) if as_json else report)
    return DataError.exit_code if report.nothing_fits else 0


if __name__ == "__main__":
    run_job(main)
