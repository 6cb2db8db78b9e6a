"""Move events, predictions and actuals from the streams into their Delta tables, exactly once.

    python jobs/sink_streams.py --once
    python jobs/sink_streams.py --interval 1.0

Without ``--once`` it runs until SIGTERM. It may be killed at any point, and several may run.
"""

from __future__ import annotations

import json
import signal
import threading
from typing import Annotated

import typer

from heliostat.cli import ConfigOption, HomeOption, run_job, shell_settings
from heliostat.ingestion.sink import Sink
from heliostat.workspace import Workspace


def main(
    once: Annotated[bool, typer.Option("--once", help="Move what is there now, then end.")] = False,
    interval: Annotated[
        float | None, typer.Option(min=0.01, help="Seconds between two moves; default: ingestion.sink_interval_s.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was moved as JSON.")] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
) -> None:
    """Move events, predictions and actuals from the streams into their Delta tables, exactly once."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    settings = shell_settings(config, home)
    with Workspace.open(settings) as workspace:
        sink = Sink.of(workspace)
        pause_s = settings.ingestion.sink_interval_s if interval is None else interval
        moved = sink.drain_once() if once else sink.run_forever(pause_s, stop)
    print(json.dumps(moved.to_document()) if as_json else f"moved {moved}")


if __name__ == "__main__":
    run_job(main)
