"""Take live events from Kafka topics, as the setting ingestion.kafka says.

    python jobs/consume_kafka.py
    python jobs/consume_kafka.py --idle 10      # until nothing has come for ten seconds

Runs until SIGTERM. It may be killed at any point, and several may run: they share the topics'
partitions. Needs `pip install 'heliostat[kafka]'`.
"""

from __future__ import annotations

import json
import signal
import threading
from dataclasses import asdict
from typing import Annotated

import typer

from heliostat.cli import ConfigOption, HomeOption, run_job, shell_settings
from heliostat.ingestion.intake import Intake
from heliostat.ingestion.kafka import KafkaIntake
from heliostat.workspace import Workspace


def main(
    idle: Annotated[
        float | None, typer.Option(min=0.1, help="End when nothing has come for so long, seconds.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was taken as JSON.")] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
) -> None:
    """Take live events from Kafka topics until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    settings = shell_settings(config, home)
    with Workspace.open(settings) as workspace:
        definitions, kafka = workspace.definitions, settings.ingestion.kafka
        for source in kafka.topics.values():
            definitions.source(source)  # a topic of an unknown source is told before anything is read
        intake = Intake.of(workspace, workspace.online)
        limit = settings.ingestion.max_events_per_request
        with KafkaIntake(kafka, intake, workspace.offline_store, workspace.clock, batch=limit) as consumer:
            taken = consumer.run_forever(stop, idle_s=idle)
    print(json.dumps(asdict(taken)) if as_json else f"took {taken}")


if __name__ == "__main__":
    run_job(main)
