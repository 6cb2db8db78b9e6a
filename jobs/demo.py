"""The whole platform on real data, in a few minutes: `make demo`.

From the CDNOW purchase log to served, monitored predictions. Everything is real: an embedded
Valkey server, a Ray cluster of this machine's own, HTTP on a free port. All that it starts is
stopped at the end, also after Ctrl-C; what it wrote stays in the home folder to be looked at.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import pyarrow.compute as pc
import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from configs.churn.cdnow import write_parquet
from deployments import graph
from heliostat import cluster
from heliostat.cli import run_job
from heliostat.clock import format_instant
from heliostat.errors import HeliostatError
from heliostat.ingestion.intake import ingest_files
from heliostat.ingestion.sink import Sink
from heliostat.models.definitions import ModelSpec
from heliostat.monitoring.checks import run_checks
from heliostat.monitoring.verdict import Severity, Verdict
from heliostat.online.materialize import materialize
from heliostat.online.tiles import RingLimits
from heliostat.retraining import decide, state_of
from heliostat.settings import Settings, load_settings
from heliostat.training.trainer import TrainingReport, train
from heliostat.workspace import Workspace

MODEL = "churn"
SOURCE = "purchases"
CUSTOMERS = 2_000
A_REQUEST = 100
UNKNOWN_CUSTOMER = 99_999_999


class DemoError(HeliostatError):
    """Something that the demo shows didn't happen."""


@dataclass
class Story:
    """What happened, for the summary; and how it is told meanwhile."""

    console: Console
    began: float = field(default_factory=time.perf_counter)
    facts: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Tell a step: a spinner while it runs, a line with its time and outcome afterwards."""
        begin = time.perf_counter()
        with self.console.status(f"[bold]{title}[/] …") as status:
            step = Step(title, status.update)
            yield step
        took = time.perf_counter() - begin
        self.console.print(f"[green]✓[/] [bold]{title}[/]  [dim]{took:.1f} s[/]", highlight=False)
        for line in step.lines:
            self.console.print(f"    {line}", highlight=False)


@dataclass
class Step:
    """One step of the story."""

    title: str
    show: Any
    lines: list[str] = field(default_factory=list)

    def now(self, doing: str) -> None:
        """What it does at this moment."""
        self.show(f"[bold]{self.title}[/] [dim]{doing}[/] …")

    def say(self, line: str) -> None:
        """One line of its outcome."""
        self.lines.append(line)


def main(
    home: Annotated[Path, typer.Option(help="Where everything is kept; emptied first.")] = Path(".heliostat/demo"),
) -> None:
    """From raw purchases to served and monitored predictions; stops what it starts."""
    _handle_interrupts(signal.default_int_handler)
    _clear(home)
    story = Story(Console(file=os.fdopen(os.dup(1), "w")))
    settings = load_settings(["configs/local.yaml"], environ=os.environ, home=home, serving={"port": 0})
    story.console.rule("[bold]Heliostat: from raw purchases to predictions you can trust")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet(settings.home / "demo.log"))
        stack.callback(_stop, story, settings)
        workspace = stack.enter_context(Workspace.open(settings))
        try:
            _tell(story, workspace, stack)
        finally:
            # From here on it is being stopped; a second Ctrl-C mustn't leave half of it running.
            _handle_interrupts(signal.SIG_IGN)
    story.console.print(_summary(story))


def _handle_interrupts(handler: Callable[..., Any] | signal.Handlers) -> None:
    """Both kinds, also where a shell lets its background jobs ignore them: much is running that must be stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _clear(home: Path) -> None:
    """Empty a folder that an earlier demo left, and no other."""
    if home.exists() and any(home.iterdir()) and not (home / "demo").exists():
        raise DemoError(f"{home} isn't a demo's folder; name another with --home")
    if home.exists():
        cluster.stop_head(home.absolute())
        shutil.rmtree(home)
    home.mkdir(parents=True)
    (home / "demo").touch()


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Send what Ray's processes and libraries print to a file for a while."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    with log.open("ab") as file:
        for number, _ in kept:
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)


def _stop(story: Story, settings: Settings) -> None:
    """Stop the cluster; closing the workspace has let go of the embedded server already."""
    try:
        with story.step("Stop everything that was started"):
            cluster.stop_head(settings.home)
    finally:
        cluster.stop_head(settings.home)  # also where nobody reads what it tells, and telling it fails


def _tell(story: Story, workspace: Workspace, stack: contextlib.ExitStack) -> None:
    settings = workspace.settings
    with story.step("Start the embedded store and Ray") as step:
        cluster.start_head(settings)
        stack.enter_context(cluster.connect(settings))
        _handle_interrupts(signal.default_int_handler)  # Ray has brought its own
        step.say(f"it is {format_instant(workspace.clock.now_us())[:10]}: the clock replays the end of the data")
    _ingest(story, workspace)
    first, second = _learn(story, workspace)
    with story.step("Materialize: history into online rings") as step:
        for done in materialize(
            list(workspace.definitions.views.values()),
            event_log=workspace.event_log,
            online=workspace.online_config,
            as_of_us=workspace.clock.now_us(),
            limits=RingLimits.of(settings.ingestion),
        ):
            step.say(f"{done.rings.written:,} rings of {done.entities:,} customers from {done.events:,} purchases")
    with story.step("Deploy the inference graph on Ray Serve") as step:
        url = graph.deploy(settings)
        step.say(f"{settings.serving.placement}, behind HAProxy, at {url}")
    with httpx.Client(base_url=url, timeout=30.0) as client:
        _ask(story, client)
        _split(story, workspace, client, first, second)
    _batch(story, workspace)
    _watch(story, workspace)


def _ingest(story: Story, workspace: Workspace) -> None:
    source = workspace.definitions.source(SOURCE)
    file = workspace.settings.home / "purchases.parquet"
    with story.step("Ingest the CDNOW purchase log") as step:
        write_parquet(file)
        report = ingest_files([file], source, workspace=workspace)
        again = ingest_files([file], source, workspace=workspace)
        step.say(f"{report.accepted:,} purchases taken in, {report.rejected} refused")
        step.say(f"the same file again: {again.accepted} new, {again.duplicates:,} known by their ids")
        if again.accepted or report.accepted != report.rows:
            raise DemoError("the event log isn't what the file holds")
    with story.step("Register the declarations") as step:
        plan = workspace.features.apply(workspace.definitions)
        step.say(", ".join(f"{change.kind} {change.name}@{change.version}" for change in plan.added))
    story.facts["purchases"] = f"{report.accepted:,}"


def _learn(story: Story, workspace: Workspace) -> tuple[TrainingReport, TrainingReport]:
    spec = workspace.definitions.model(MODEL)
    plain = workspace.settings.training.model_copy(update={"trials": 0})
    with story.step("Train version 1 with the declared parameters") as step:
        with _using(workspace, plain):
            first = _trained(workspace, spec, step)
        step.say(
            f"{first.rows[0]:,} rows at {len(first.split.train_us)} instants, judged on {first.rows[1]:,} later ones"
        )
        step.say(f"AUC {first.evaluation.main}; by recency alone {first.baseline.estimate}")
        step.say(f"gate: {'passed, promoted' if first.promoted else 'not passed'}")
    if not first.promoted:
        raise DemoError("the gate refused version 1: " + "; ".join(first.lines()))
    with story.step("Search for better parameters and train version 2") as step:
        second = _trained(workspace, spec, step, promote=False)
        step.say(f"{len(second.trials)} parameter sets, the best: {_parameters(second)}")
        step.say(f"AUC {second.evaluation.main}; gain over recency {second.baseline.gain}")
        compared = "against version 1 on the same rows"
        step.say(
            f"gate {compared}: {'passed' if second.gate.passed else 'not passed, yet it may be tried on a part'}"
        )
    best = max(first, second, key=lambda report: report.evaluation.main.value)
    story.facts["AUC"] = f"{best.evaluation.main} on {best.rows[1]:,} rows of later months"
    story.facts["recency alone"] = f"{best.baseline.estimate}, gain {best.baseline.gain}"
    return first, second


@contextlib.contextmanager
def _using(workspace: Workspace, training: Any) -> Iterator[None]:  # noqa: ANN401 - a settings section
    """The workspace with other training settings for a while."""
    kept = workspace.settings
    workspace.settings = kept.model_copy(update={"training": training})
    yield
    workspace.settings = kept


def _trained(workspace: Workspace, spec: ModelSpec, step: Step, *, promote: bool = True) -> TrainingReport:
    return train(
        workspace,
        spec,
        promote=promote,
        progress=step.now,
    )


def _parameters(report: TrainingReport) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in report.trials[0].parameters.items()
    )


def _post(client: httpx.Client, path: str, document: dict[str, Any]) -> dict[str, Any]:
    answer = client.post(path, json=document)
    if answer.is_error:
        raise DemoError(f"{path} answered {answer.status_code}: {answer.text[:500]}")
    found: dict[str, Any] = answer.json()
    return found


def _ask(story: Story, client: httpx.Client) -> None:
    with story.step("Ask for predictions over HTTP") as step:
        one = _post(client, "/predict", {"entity_ids": [4]})
        step.say(f"customer 4: churns with {one['predictions'][0]:.3f}, says version {one['model_version']}")
        many = _post(client, "/predict", {"entity_ids": list(range(1, A_REQUEST + 1))})
        step.say(f"{len(many['predictions'])} customers in one request: {many['latency_ms']:.1f} ms in the graph")
        nobody = _post(client, "/predict", {"entity_ids": [UNKNOWN_CUSTOMER]})["entities"][0]
        step.say(f"an unknown customer: answered, and marked absent from {', '.join(nobody['absent_views'])}")
        if not nobody["absent_views"]:
            raise DemoError("an unknown customer wasn't marked absent")
    with story.step("Send an event, and ask again") as step:
        before = client.get("/features/recent_purchases/4").json()["features"]
        event = {"event_id": 1_000_001, "customer_id": 4, "quantity": 4, "amount": 61.5}
        event["purchased_at"] = "1998-06-30T20:00:00Z"  # type: ignore[assignment]
        _post(client, "/events", {"source": SOURCE, "events": [event]})
        after = client.get("/features/recent_purchases/4").json()["features"]
        then = _post(client, "/predict", {"entity_ids": [4]})
        for name in ("count_30d", "amount_90d", "activity_score"):
            step.say(f"{name:15} {before[name]:8.3f} → {after[name]:8.3f}")
        step.say(f"{'churn':15} {one['predictions'][0]:8.3f} → {then['predictions'][0]:8.3f}")
        if after["count_30d"] != before["count_30d"] + 1:
            raise DemoError("the event didn't change the online features")


def _split(
    story: Story, workspace: Workspace, client: httpx.Client, first: TrainingReport, second: TrainingReport
) -> None:
    customers = pc.unique(
        workspace.event_log.read(
            workspace.definitions.source(SOURCE), workspace.definitions.entities["customer"]
        ).column("customer_id")
    ).to_pylist()
    chosen = np.random.default_rng(7).permutation(customers)[:CUSTOMERS].tolist()
    with story.step("Split traffic between two versions") as step:
        workspace.rollout.start_split(
            MODEL, experiment="tuned", control=first.version, challenger=second.version, weight=0.5, reason="demo"
        )
        served: Counter[str] = Counter()
        for begin in range(0, len(chosen), A_REQUEST):
            answer = _post(client, "/predict", {"entity_ids": chosen[begin : begin + A_REQUEST]})
            served.update(f"{each['variant']} (version {each['model_version']})" for each in answer["entities"])
        step.say(", ".join(f"{name}: {count}" for name, count in sorted(served.items())))
        if len(served) != 2 or sum(served.values()) != len(chosen):
            raise DemoError(f"traffic wasn't split in two: {dict(served)}")
    with story.step("Measure the latency of single requests") as step:
        taken = []
        for customer in chosen[:300]:
            begin_s = time.perf_counter()
            _post(client, "/predict", {"entity_ids": [customer]})
            taken.append((time.perf_counter() - begin_s) * 1e3)
        p50, p99 = np.percentile(taken, [50, 99])
        story.facts["latency"] = f"{p50:.1f} ms median, {p99:.1f} ms p99, through HTTP, one at a time"
        step.say(story.facts["latency"])


def _batch(story: Story, workspace: Workspace) -> None:
    home = workspace.settings.home
    with story.step("Predict for everybody: a job, through ray job submit") as step:
        address = cluster.jobs_address(home)
        command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", "."]
        command += ["--address", str(address), "--", "python", "jobs/batch_predict.py", "--model", MODEL]
        environment = {**os.environ, **workspace.settings.environment()}
        done = subprocess.run(  # noqa: S603 - our own program
            command, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise DemoError(f"the batch job failed:\n{(done.stderr + done.stdout)[-2000:]}")
        results = workspace.offline_store.read_batch(MODEL)
        step.say(f"{results.num_rows:,} customers scored by version {results.column('model_version')[0]}")
        story.facts["batch"] = f"{results.num_rows:,} customers, in a Delta table"


def _watch(story: Story, workspace: Workspace) -> None:
    with story.step("Move the streams into Delta tables, exactly once") as step:
        step.say(f"{Sink.of(workspace).drain_once()}")
    with story.step("Look at what was served: parity, drift, quality") as step:
        parity, *others = run_checks(workspace, workspace.settings, ["parity", "drift", "quality"], model=MODEL)
        for verdict in (parity, *others):
            step.say(_headline(verdict))
        step.say("the drift is real: the customers of 1997 have fallen silent by the summer of 1998")
        story.facts["parity"] = f"{_headline(parity)}: what was served is what the log gives"
        if parity.status is not Severity.OK:
            raise DemoError("served vectors differ from the log's:\n" + "\n".join(parity.lines()))
    with story.step("Decide whether to train again") as step:
        now_us = workspace.clock.now_us()
        decision = decide(state_of(workspace, MODEL), workspace.settings.retraining, now_us=now_us)
        for line in decision.lines():
            step.say(line)
        story.facts["retraining"] = "due" if decision.due else "not due"


def _headline(verdict: Verdict) -> str:
    worst = verdict.findings[0]
    told = "" if verdict.status is Severity.OK else f"; first of all {worst.subject}: {worst.message}"
    return f"{verdict.check}: {verdict.status.value} on {verdict.n_rows:,} rows{told}"


def _summary(story: Story) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, fact in story.facts.items():
        table.add_row(name, fact)
    table.add_row("all of it", f"{time.perf_counter() - story.began:.0f} s; everything that was started is stopped")
    table.add_row(
        "look next", "docs/quickstart.md: the same by hand   ·   configs/churn/definitions.py: all you write"
    )
    table.add_row("", "export HELIOSTAT_CONFIG=configs/local.yaml HELIOSTAT_HOME=.heliostat/demo")
    table.add_row("", ".venv/bin/heliostat models show churn   ·   .venv/bin/heliostat features list")
    return Panel(table, title="[bold]What happened[/]", border_style="green")


if __name__ == "__main__":
    run_job(main)
