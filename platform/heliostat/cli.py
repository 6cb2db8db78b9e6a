"""The command line."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer

from heliostat import cluster, data_commands
from heliostat.clock import format_instant
from heliostat.errors import DataError, ServingUnavailableError
from heliostat.errors.base import reason_of
from heliostat.features.registry import Plan
from heliostat.ingestion.intake import ingest_files
from heliostat.key_commands import keys_app
from heliostat.models.registry import PRODUCTION
from heliostat.online.costs import backfill_costs
from heliostat.online.retrieval import FeatureReader
from heliostat.online.tiles import RingLimits
from heliostat.rebuild import rebuild, shown
from heliostat.replay import replay
from heliostat.shell import (
    ALARM,
    ConfigOption,
    HomeOption,
    JsonOption,
    ReasonOption,
    api_key_headers,
    console,
    print_json,
    print_table,
    run,
    run_job,
    shell_settings,
)
from heliostat.status import serving_url, status_of
from heliostat.storage.embedded import EmbeddedServer
from heliostat.storage.online_store import OnlineKeys
from heliostat.workspace import Workspace

__all__ = ["ALARM", "ConfigOption", "HomeOption", "JsonOption", "ReasonOption", "run_job", "shell_settings"]

_HTTP_TIMEOUT_S = 30.0

_logger = logging.getLogger("heliostat.cli")


def main() -> NoReturn:
    """The `heliostat` command."""
    sys.exit(run(app))


app = typer.Typer(
    name="heliostat",
    help="One declaration of a feature, a label and a model: from the training set to the retraining decision.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
features_app = typer.Typer(help="Registered features, and their values now.", no_args_is_help=True)
models_app = typer.Typer(help="Model versions and what serves.", no_args_is_help=True)
app.add_typer(features_app, name="features")
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.command("prune")(data_commands.prune_events)
app.command("forget")(data_commands.forget_entity)


# ── Running it ──────────────────────────────────────────────────────────────────────


@app.command()
def up(
    config: ConfigOption = None,
    home: HomeOption = None,
    serve: Annotated[bool, typer.Option(help="Also deploy the inference graph.")] = True,
) -> None:
    """Start the embedded store, a Ray head with its job API, and the inference graph; they stay until `down`."""
    settings = shell_settings(config, home)
    settings.home.mkdir(parents=True, exist_ok=True)
    if settings.online.url is None:
        EmbeddedServer.ensure(settings.home, keep=True, fsync=settings.online.fsync).close()
        console.print("online store   embedded, running")
    address = os.environ.get("RAY_ADDRESS") or cluster.start_head(settings)
    console.print(f"ray            {address}")
    jobs = cluster.jobs_address(settings.home)
    if jobs:
        console.print(f"job API        {jobs}")
    if serve:
        with Workspace.open(settings) as workspace, cluster.connect(workspace.settings):
            url = importlib.import_module("deployments.graph").deploy(workspace.settings)
        console.print(f"predictions    {url}  (documentation: {url}/docs)")


@app.command()
def down(config: ConfigOption = None, home: HomeOption = None) -> None:
    """Stop what `up` started for this home, and nothing else; what was asked is answered and logged, data stay."""
    settings = shell_settings(config, home)
    # With RAY_ADDRESS the graph is somebody else's cluster's.
    if cluster.head_address(settings.home) and "RAY_ADDRESS" not in os.environ:
        try:
            with cluster.connect(settings):
                drained = importlib.import_module("deployments.graph").drain()
        except Exception as error:  # noqa: BLE001 - what can't be asked to end is ended all the same
            _logger.warning("the inference graph is stopped as it is: %s", error)
        else:
            console.print(f"predictions    {'answered and logged, stopped' if drained else 'was not running'}")
    ray_stopped = cluster.stop_head(settings.home)
    store_stopped = EmbeddedServer.stop(settings.home)
    console.print(f"ray            {'stopped' if ray_stopped else 'was not running'}")
    console.print(f"online store   {'stopped' if store_stopped else 'was not running'}")


@app.command()
def status(config: ConfigOption = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """What runs, what is registered, and how fresh the online store is."""
    with Workspace.open(shell_settings(config, home)) as workspace:
        document = status_of(workspace)
    if as_json:
        print_json(document)
    else:
        for name, value in document.items():
            console.print(f"{name:14} {value if value not in (None, [], {}) else '-'}", highlight=False)


@app.command("rebuild")
def rebuild_online(config: ConfigOption = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Restore all online state from log, catalog and tables, after the online server's data were lost."""
    settings = shell_settings(config, home)
    with Workspace.open(settings) as workspace, shown() as step:
        rebuilt = rebuild(workspace, on_step=step)
    if as_json:
        print_json(rebuilt.describe())
    else:
        console.print(str(rebuilt), highlight=False)


# ── Declarations, features, events ──────────────────────────────────────────────────


@app.command()
def plan(config: ConfigOption = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """What `apply` would change, and what the backfill of new views costs; changes nothing."""
    with Workspace.open(shell_settings(config, home)) as workspace:
        planned = workspace.features.plan(workspace.definitions)
        costs = backfill_costs(
            [workspace.definitions.view(ref) for ref in planned.new_views],
            workspace.event_log,
            as_of_us=workspace.clock.now_us(),
            keys=OnlineKeys(workspace.configured.online.key_prefix, workspace.configured.project),
            limits=RingLimits.of(workspace.settings.ingestion),
        )
    if as_json:
        print_json({**planned.to_document(), "backfill": [cost.to_document() for cost in costs]})
        return
    _print_plan(planned)
    for cost in costs:
        console.print(f"backfill of {', '.join(cost.views)}: {cost}", highlight=False)


@app.command()
def apply(
    config: ConfigOption = None,
    home: HomeOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change, as `plan` does.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Register what the definitions module declares, in one transaction."""
    with Workspace.open(shell_settings(config, home)) as workspace:
        registry = workspace.features
        applied = registry.plan(workspace.definitions) if dry_run else registry.apply(workspace.definitions)
    if as_json:
        print_json(applied.to_document())
    else:
        _print_plan(applied)


def _print_plan(plan: Plan) -> None:
    for sign, what, changes in (
        ("+", "green", plan.added),
        ("~", "yellow", plan.changed),
        ("-", "red", plan.removed),
    ):
        for change in changes:
            beside = "".join(f", beside {change.name}@{version}" for version in change.beside)
            console.print(f"[{what}]{sign}[/] {change.kind} {change.ref}{beside}", highlight=False)
            for difference in change.differences:
                console.print(f"    {difference}", highlight=False, markup=False)
    console.print(f"{len(plan.unchanged)} unchanged")


@app.command()
def ingest(
    paths: Annotated[list[Path], typer.Argument(help="Parquet or CSV files, or folders of them.")],
    source: Annotated[str, typer.Option("--source", help="The event source that they are of.")],
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> int:
    """Take files of events into the event log; repeating it changes nothing."""
    with Workspace.open(shell_settings(config, home)) as workspace:
        report = ingest_files(paths, workspace.definitions.source(source), workspace=workspace)
    if as_json:
        print_json(report.to_document())
    else:
        console.print(str(report), highlight=False)
    return DataError.exit_code if report.nothing_fits else 0


@features_app.command("list")
def features_list(config: ConfigOption = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Registered features, of all versions of views."""
    _print_features("", config, home, as_json=as_json)


@features_app.command("search")
def features_search(
    words: Annotated[list[str], typer.Argument(help="Words that must all appear: names, tags, owners, columns, …")],
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Registered features whose metadata hold all of the words."""
    _print_features(" ".join(words), config, home, as_json=as_json)


def _print_features(text: str, config: list[Path] | None, home: Path | None, *, as_json: bool) -> None:
    with Workspace.open(shell_settings(config, home)) as workspace:
        found = workspace.features.features(text)
    if as_json:
        print_json([info.to_document() for info in found])
        return
    columns = ("feature", "what", "source", "read by", "owner", "description")
    rows = [
        (
            each.ref,
            each.function,
            f"{each.source}: {', '.join(each.columns)}",
            ", ".join((*each.used_by, *each.versions)) or "-",
            each.owner,
            each.description,
        )
        for each in found
    ]
    print_table(f"{len(found)} features", columns, rows)


@features_app.command("get")
def features_get(
    view: Annotated[str, typer.Argument(help="A feature view, with or without @version.")],
    entity: Annotated[str | None, typer.Argument(help="An entity's key; several columns are joined by |.")] = None,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """All that is registered of a view's features; of an entity, their values now, from the online store."""
    if entity is None:
        with Workspace.open(shell_settings(config, home)) as workspace:
            print_json([info.to_document() for info in workspace.features.view(view)])
        return
    with Workspace.open(shell_settings(config, home)) as workspace:
        declared = workspace.definitions.view(view)
        text = declared.entity.text(entity)
        limits = RingLimits.of(workspace.settings.ingestion)
        n_buckets = workspace.settings.storage.buckets
        online, stored = workspace.online, declared.stored_features
        refs = [declared[name] for name in stored]
        reader = FeatureReader(refs, keys=online.keys, n_buckets=n_buckets, limits=limits)
        now_us = workspace.clock.now_us()
        batch, _ = reader.read(online, [text], as_of_us=now_us)
        values: dict[str, Any] = dict(zip(stored, batch.matrix[0].tolist(), strict=True))
        for name in declared.categorical:
            (known,) = workspace.categories.texts(declared, name, batch.matrix[0, [stored.index(name)]])
            values[name] = values[name] if known is None else known
    document = {
        "view": declared.ref,
        "entity": text,
        "as_of": format_instant(now_us),
        "absent": bool(batch.absent[0, 0]),
        "features": {name: None if value != value else value for name, value in values.items()},
    }
    if as_json:
        print_json(document)
    else:
        title = f"{declared.ref} of {text}" + (": absent, reads as no events" if document["absent"] else "")
        print_table(title, ("feature", "value"), list(values.items()))


# ── Models ──────────────────────────────────────────────────────────────────────────


@models_app.command("list")
def models_list(
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Versions, oldest first."""
    with Workspace.open(shell_settings(config, home)) as workspace:
        versions = workspace.models.list(model)
    if as_json:
        print_json([version.to_document() for version in versions])
    else:
        rows = [
            (each.model, each.version, each.status, ", ".join(each.aliases) or "-", format_instant(each.created_us))
            for each in versions
        ]
        print_table(f"{len(rows)} versions", ("model", "version", "status", "aliases", "created"), rows)


@models_app.command("show")
def models_show(
    model: str,
    version: Annotated[str, typer.Argument(help="A number, an alias, or latest.")] = "latest",
    config: ConfigOption = None,
    home: HomeOption = None,
) -> None:
    """All that is known about a version, as JSON: metrics, lineage, parameters, signature, gate."""
    with Workspace.open(shell_settings(config, home)) as workspace:
        found = workspace.models.get(model, _selector(version))
        gate = workspace.models.gate_report(model, found.version)
    print_json({**found.to_document(), "gate": gate})


@models_app.command("promote")
def models_promote(
    model: str,
    version: int,
    config: ConfigOption = None,
    home: HomeOption = None,
    reason: ReasonOption = "",
    force: Annotated[bool, typer.Option("--force", help="Without a passed gate; needs --reason.")] = False,
) -> None:
    """Let a version serve everybody; requests see it at once."""
    with Workspace.open(shell_settings(config, home)) as workspace:
        alias = workspace.promote(model, version, reason=reason, force=force)
    console.print(f"{model}: {PRODUCTION} is version {alias.version}", highlight=False)


@models_app.command("rollback")
def models_rollback(
    model: str, config: ConfigOption = None, home: HomeOption = None, reason: ReasonOption = "rolled back by hand"
) -> None:
    """Back to the version that served before; a running split ends."""
    with Workspace.open(shell_settings(config, home)) as workspace:
        alias = workspace.roll_back(model, reason=reason)
    console.print(f"{model}: {PRODUCTION} is version {alias.version}", highlight=False)


def _selector(text: str) -> int | str:
    return int(text) if text.isdigit() else text


@app.command()
def predict(
    entities: Annotated[list[str], typer.Argument(help="Entity keys.")],
    model: Annotated[str | None, typer.Option("--model", help="Needed if several are declared.")] = None,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the running inference graph, with the API key in HELIOSTAT_API_KEY if it wants one."""
    settings = shell_settings(config, home)
    request: dict[str, Any] = {"entity_ids": entities} | ({} if model is None else {"model": model})
    try:
        url, headers = f"{serving_url(settings)}/predict", api_key_headers()
        answer = httpx.post(url, json=request, headers=headers, timeout=_HTTP_TIMEOUT_S)
        document = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ServingUnavailableError(serving_url(settings), reason_of(error)) from None
    if answer.is_error:
        raise ServingUnavailableError(serving_url(settings), f"{answer.status_code}: {document.get('message')}")
    if as_json:
        print_json(document)
        return
    rows = [
        (each["entity_id"], f"{score:.4f}", each["variant"], each["model_version"], len(each["missing_features"]))
        for each, score in zip(document["entities"], document["predictions"], strict=True)
    ]
    print_table(f"{document['latency_ms']:.1f} ms", ("entity", "prediction", "variant", "version", "missing"), rows)


@app.command("replay-prediction")
def replay_prediction(
    prediction_id: Annotated[str, typer.Argument(help="The `prediction_id` of an answer.")],
    model: Annotated[str | None, typer.Option("--model", help="Look only for predictions of this model.")] = None,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> int:
    """Make a logged prediction once more from its row, and say whether it is the same; exit code 1 if not."""
    with Workspace.open(shell_settings(config, home)) as workspace:
        replayed = replay(workspace, prediction_id, model=model)
    if as_json:
        print_json(replayed.to_document())
    else:
        console.print("\n".join(replayed.lines()), highlight=False, markup=False, soft_wrap=True)
    return 0 if replayed.same else 1


if __name__ == "__main__":
    main()
