"""Settings: one frozen tree, and the only reader of YAML files and the environment.

Layers, each over the one before: the defaults here (written out in ``configs/base.yaml``),
the file named by ``--config`` or ``HELIOSTAT_CONFIG`` (several: comma-separated), then
environment variables, with two underscores between levels: ``HELIOSTAT_SERVING__PORT=9000``.
An unknown key or variable is refused, with the nearest known names.

Settings are loaded in shells (jobs, the command line, deployments) and passed as arguments.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from heliostat.clock import Clock, ReplayClock, SystemClock, format_instant, parse_duration_us, parse_instant_us
from heliostat.errors import HeliostatError, MissingFileError, SettingsError, UnknownSettingError

PREFIX = "HELIOSTAT_"
API_KEY = "API_KEY"
"""The variable, behind `PREFIX`, with the API key of a shell's own requests: no setting, since settings travel."""
BASE_FILE = Path("configs/base.yaml")


def _duration(value: str) -> str:
    parse_duration_us(value)
    return value


def _checked(value: Any, check: Any) -> Any:  # noqa: ANN401 - pydantic passes raw input
    try:
        check(value)
    except HeliostatError as error:
        raise ValueError(str(error)) from None
    return value


def _instant(value: Any) -> str:  # noqa: ANN401 - YAML gives text, a date or a datetime
    return format_instant(
        parse_instant_us(_checked(value if not isinstance(value, str) else value.strip(), parse_instant_us))
    )


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ClockSettings(_Section):
    """Which time it is."""

    kind: Literal["system", "replay"] = "system"
    replay_from: str | None = None
    speed: Annotated[float, Field(ge=0)] = 1.0

    @field_validator("replay_from", mode="before")
    @classmethod
    def _one_form(cls, value: Any) -> str | None:  # noqa: ANN401 - raw input
        return None if value is None else _instant(value)

    @model_validator(mode="after")
    def _replay_needs_a_start(self) -> ClockSettings:
        if self.kind == "replay" and self.replay_from is None:
            raise ValueError("a replay clock needs clock.replay_from, such as 1998-07-01")
        return self


class StorageSettings(_Section):
    """Delta tables and artifacts."""

    root: str | None = None
    shared: bool = False
    options: dict[str, str] = Field(default_factory=dict, repr=False)  # may hold secrets
    buckets: Annotated[int, Field(ge=1, le=4096)] = 16
    retention: str | None = None
    vacuum_after: str | None = "1d"

    _check = field_validator("retention", "vacuum_after")(
        lambda value: None if value is None else _checked(value, parse_duration_us)
    )

    @field_validator("root")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return value if value is None or "://" in value else str(Path(value).expanduser().absolute())


class OnlineSettings(_Section):
    """The online store and the streams: a server that speaks the Redis protocol."""

    url: str | None = Field(default=None, repr=False)  # may hold a password
    cluster: bool = False
    key_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "hs"
    timeout_s: Annotated[float, Field(gt=0)] = 2.0
    max_connections: Annotated[int, Field(ge=1)] = 64
    fsync: Literal["everysec", "always"] = "everysec"

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: str | None) -> str | None:
        if value is not None and value.partition("://")[0] not in ("redis", "rediss", "unix"):
            raise ValueError("it is no Redis address; write redis://host:6379/0, rediss://… or unix:///path")
        return value


class CatalogSettings(_Section):
    """Versions, aliases, lineage, experiments and verdicts: a database."""

    url: str | None = Field(default=None, repr=False)  # may hold a password


class RaySettings(_Section):
    """How Ray is started when there is no RAY_ADDRESS."""

    cpus: Annotated[int, Field(ge=1)] | None = None
    object_store_bytes: Annotated[int, Field(ge=80_000_000)] = 1_000_000_000
    dashboard: bool = False


class KafkaSettings(_Section):
    """Topics that events are taken from (`jobs/consume_kafka.py`)."""

    brokers: str | None = None
    group: str = "heliostat"
    topics: dict[str, str] = Field(default_factory=dict)
    start: Literal["earliest", "latest"] = "earliest"
    options: dict[str, str | int | float | bool] = Field(default_factory=dict, repr=False)  # may hold a password


class IngestionSettings(_Section):
    """How events are taken in."""

    future_tolerance: str = "60s"
    lateness: str = "1d"
    max_events_per_request: Annotated[int, Field(ge=1)] = 1_000
    batch_rows: Annotated[int, Field(ge=1)] = 250_000
    sink_interval_s: Annotated[float, Field(gt=0)] = 1.0
    kafka: KafkaSettings = KafkaSettings()

    _check = field_validator("future_tolerance", "lateness")(lambda value: _checked(value, parse_duration_us))

    @property
    def future_tolerance_us(self) -> int:
        """How far in the future an event may be, microseconds."""
        return parse_duration_us(self.future_tolerance)

    @property
    def lateness_us(self) -> int:
        """How late an event may come and still reach the online rings, microseconds."""
        return parse_duration_us(self.lateness)


class MaterializationSettings(_Section):
    """How history is brought into the online rings."""

    full_every: str = "1d"
    max_entities_per_s: Annotated[float, Field(gt=0)] | None = None
    max_bytes_per_s: Annotated[float, Field(gt=0)] | None = None

    _check = field_validator("full_every")(lambda value: _checked(value, parse_duration_us))

    @property
    def full_every_us(self) -> int:
        """After how long all entities are looked at again, microseconds."""
        return parse_duration_us(self.full_every)


class TrainingSettings(_Section):
    """How models are trained."""

    instants: tuple[str, ...] = ()
    validation_instants: tuple[str, ...] = ()
    trials: Annotated[int, Field(ge=0)] = 6
    concurrent_trials: Annotated[int, Field(ge=1)] = 2
    rounds: Annotated[int, Field(ge=1)] = 300
    early_stopping_rounds: Annotated[int, Field(ge=1)] = 20
    workers: Annotated[int, Field(ge=1)] = 1
    seed: int = 7

    @field_validator("instants", "validation_instants", mode="before")
    @classmethod
    def _one_form(cls, value: Any) -> tuple[str, ...]:  # noqa: ANN401 - raw input
        items = value.split(",") if isinstance(value, str) else [value] if isinstance(value, date) else value
        return tuple(_instant(item) for item in items or ())


class LastSeenSettings(_Section):
    """What a replica remembers of looked-up features, for when the online store doesn't answer."""

    entities: Annotated[int, Field(ge=0)] = 10_000
    max_age: str = "5m"

    _check = field_validator("max_age")(lambda value: _checked(value, parse_duration_us))

    @property
    def max_age_s(self) -> float:
        """How old it may be, seconds."""
        return parse_duration_us(self.max_age) / 1e6


class BreakerSettings(_Section):
    """When something that fails isn't asked any more, and for how long."""

    failures: Annotated[int, Field(ge=1)] = 3
    open_s: Annotated[float, Field(gt=0)] = 1.0
    max_open_s: Annotated[float, Field(gt=0)] = 5.0

    @model_validator(mode="after")
    def _in_order(self) -> BreakerSettings:
        if self.max_open_s < self.open_s:
            raise ValueError("serving.breaker.max_open_s must not be below serving.breaker.open_s")
        return self


class AutoscalingSettings(_Section):
    """How many replicas there are, by what they have to do; off while ``max_replicas`` is null."""

    max_replicas: Annotated[int, Field(ge=1)] | None = None
    target_requests: Annotated[float, Field(gt=0)] = 32.0
    target_calls: Annotated[float, Field(gt=0)] = 2.0
    look_back_s: Annotated[float, Field(gt=10)] = 15.0
    up_after_s: Annotated[float, Field(ge=0)] = 5.0
    down_after_s: Annotated[float, Field(ge=0)] = 300.0


FallbackRung = Literal["control", "last_good_version", "batch_prediction", "prior"]
FeatureRung = Literal["last_seen_features", "training_medians"]


class ServingSettings(_Section):
    """The inference graph."""

    placement: Literal["fused", "distributed"] = "fused"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    access: Literal["loopback", "keys"] = "loopback"
    keys_within_s: Annotated[float, Field(gt=0)] = 5.0
    keys_hold_s: Annotated[float, Field(gt=0)] = 300.0
    replicas: Annotated[int, Field(ge=1)] = 1
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    drain_s: Annotated[float, Field(gt=0)] = 30.0
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 256
    max_queued_requests: Annotated[int, Field(ge=-1)] = 1024
    deadline_ms: Annotated[float, Field(gt=0)] = 1000.0
    batch_max_entities: Annotated[int, Field(ge=1)] = 2048
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1_048_576
    body_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    max_entities_per_request: Annotated[int, Field(ge=1)] = 1_000
    when_log_fails: Literal["reject", "answer"] = "reject"
    log: Literal["durable", "async"] = "durable"
    log_buffer_rows: Annotated[int, Field(ge=1)] = 10_000
    log_max_delay_s: Annotated[float, Field(gt=0)] = 1.0
    fallback: tuple[FallbackRung, ...] = ("control", "last_good_version", "batch_prediction", "prior")
    feature_fallback: tuple[FeatureRung, ...] = ("last_seen_features", "training_medians")
    last_seen: LastSeenSettings = LastSeenSettings()
    breaker: BreakerSettings = BreakerSettings()
    model_memory_bytes: Annotated[int, Field(ge=1_000_000)] = 1_000_000_000
    model_threads: Annotated[int, Field(ge=1)] = 2
    model_isolation: Literal["measured", "always"] = "measured"
    standby_s: Annotated[float, Field(gt=0)] = 2.0

    @model_validator(mode="after")
    def _in_order(self) -> ServingSettings:
        most = self.autoscaling.max_replicas
        if most is not None and most < self.replicas:
            raise ValueError("serving.autoscaling.max_replicas must not be below serving.replicas")
        return self

    @field_validator("fallback", "feature_fallback", mode="before")
    @classmethod
    def _one_form(cls, value: Any) -> tuple[str, ...]:  # noqa: ANN401 - raw input
        return tuple(each.strip() for each in value.split(",")) if isinstance(value, str) else tuple(value or ())


class BatchSettings(_Section):
    """Batch prediction."""

    cache_above: float | None = 0.9
    cache_ttl: str = "1d"

    _check = field_validator("cache_ttl")(lambda value: _checked(value, parse_duration_us))


class ParitySettings(_Section):
    """How served vectors are compared with what training would have seen."""

    sample: Annotated[int, Field(ge=1)] = 500
    tolerance: Annotated[float, Field(ge=0)] = 1e-9
    max_mismatch_share: Annotated[float, Field(ge=0, le=1)] = 0.001


class MonitoringSettings(_Section):
    """What is looked at, and when it is worth an alarm."""

    window: str = "7d"
    min_rows: Annotated[int, Field(ge=1)] = 200
    drift_js_floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    drift_psi_floor: Annotated[float, Field(ge=0)] = 0.1
    drift_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.01
    max_null_rate_increase: Annotated[float, Field(ge=0, le=1)] = 0.05
    max_feature_age: str = "2d"
    max_outlier_increase: Annotated[float, Field(ge=0, le=1)] = 0.05
    parity: ParitySettings = ParitySettings()

    _check = field_validator("window", "max_feature_age")(lambda value: _checked(value, parse_duration_us))


class ExperimentSettings(_Section):
    """How evidence is judged."""

    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    srm_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.001
    min_exposures: Annotated[int, Field(ge=1)] = 1_000
    min_days: Annotated[float, Field(ge=0)] = 7.0


class RetrainingSettings(_Section):
    """When a model is trained again. Each trigger is off when null."""

    max_age: str | None = "7d"
    min_performance_ratio: Annotated[float, Field(gt=0)] | None = 0.95
    on_drift: Literal["look", "retrain", "ignore"] = "look"
    cooldown: str = "1d"

    _check = field_validator("max_age", "cooldown")(
        lambda value: None if value is None else _checked(value, parse_duration_us)
    )


class TelemetrySettings(_Section):
    """Logs."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["text", "json"] = "text"


class Settings(_Section):
    """Every setting. Picklable, so that it can be handed to Ray tasks."""

    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "default"
    definitions: str = "configs.churn.definitions"
    home: Path = Path(".heliostat")
    clock: ClockSettings = ClockSettings()
    storage: StorageSettings = StorageSettings()
    online: OnlineSettings = OnlineSettings()
    catalog: CatalogSettings = CatalogSettings()
    ray: RaySettings = RaySettings()
    ingestion: IngestionSettings = IngestionSettings()
    materialization: MaterializationSettings = MaterializationSettings()
    training: TrainingSettings = TrainingSettings()
    serving: ServingSettings = ServingSettings()
    batch: BatchSettings = BatchSettings()
    monitoring: MonitoringSettings = MonitoringSettings()
    experiments: ExperimentSettings = ExperimentSettings()
    retraining: RetrainingSettings = RetrainingSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @property
    def data_root(self) -> str:
        """Where Delta tables and artifacts are: a folder, or a URL such as ``s3://…``."""
        return self.storage.root or str(self.home / "data")

    @property
    def catalog_url(self) -> str:
        """The catalog's database as SQLAlchemy writes it."""
        return self.catalog.url or f"sqlite:///{self.home / 'catalog.db'}"

    def open_clock(self) -> Clock:
        """The clock that these settings name; replay clocks of one home agree with each other."""
        if self.clock.kind == "system" or self.clock.replay_from is None:
            return SystemClock()
        origin_us = parse_instant_us(self.clock.replay_from)
        return ReplayClock.anchored(origin_us, self.home / "clock.json", speed=self.clock.speed)

    def environment(self, *, secrets: bool = True) -> dict[str, str]:
        """Environment variables from which `load_settings` makes these settings again in another process.

        Args:
            secrets: Whether passwords and keys are among them; not where somebody writes them down.
        """
        leaves = _leaves(self.model_dump(mode="json"), Settings().model_dump(mode="json"))
        told = {PREFIX + name: text for name, text in leaves if secrets or not _is_secret(name, text)}
        return {PREFIX + "HOME": str(self.home)} | told


def load_settings(
    files: Sequence[str | Path] = (),
    *,
    environ: Mapping[str, str],
    base: Path | None = BASE_FILE,
    **overrides: object,
) -> Settings:
    """Load settings from their layers.

    Args:
        files: YAML files, later over earlier; without any, those that ``HELIOSTAT_CONFIG`` names.
        environ: The environment, usually ``os.environ``.
        base: The first layer, if it exists.
        overrides: Top-level settings, over all layers; None is passed over.

    Raises:
        MissingFileError: If a named file doesn't exist.
        UnknownSettingError: If a key or variable names no setting.
        SettingsError: If a value can't be used.
    """
    variables = {name.removeprefix(PREFIX): value for name, value in environ.items() if name.startswith(PREFIX)}
    named = variables.pop("CONFIG", "")
    variables.pop(API_KEY, None)
    chosen = [Path(each) for each in files] or [Path(each.strip()) for each in named.split(",") if each.strip()]
    layers: list[tuple[str, dict[str, Any]]] = []
    if base is not None and base.exists():
        layers.append((str(base), _read_yaml(base)))
    layers.extend((str(path), _read_yaml(path)) for path in chosen)
    for where, layer in layers:
        _refuse_unknown(layer, Settings, where)
    tree: dict[str, Any] = {}
    for _, layer in layers:
        _merge(tree, layer)
    _merge(tree, _from_variables(variables))
    _merge(tree, {name: value for name, value in overrides.items() if value is not None})
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        secret = path.startswith("storage.options") or path.endswith(".url")  # and so isn't repeated
        given = "" if secret else f" (got {first['input']!r})"
        raise SettingsError(f"setting {path or '(all)'}", f"{message}{given}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise MissingFileError(str(path), "name an existing YAML file with --config or HELIOSTAT_CONFIG")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SettingsError(str(path), f"it is no YAML: {error}", "correct the file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(str(path), f"it holds {type(content).__name__}, not settings by name")
    return content


def _merge(tree: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for name, value in layer.items():
        if isinstance(value, Mapping) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = dict(value) if isinstance(value, Mapping) else value


def _paths(section: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{above}{name}.")
        else:
            yield above + name


def _refuse_unknown(layer: Mapping[str, Any], section: type[BaseModel], where: str, above: str = "") -> None:
    for name, value in layer.items():
        field = section.model_fields.get(name)
        if field is None:
            raise UnknownSettingError(f"{above}{name}", where, _suggestions(f"{above}{name}"))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if not isinstance(value, Mapping):
                raise SettingsError(f"{where}: {above}{name}", f"it is {value!r}, not a group of settings")
            _refuse_unknown(value, field.annotation, where, f"{above}{name}.")


def _suggestions(path: str) -> tuple[str, ...]:
    known = list(_paths(Settings))
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
    last = [each for each in known if each.rpartition(".")[2] == path.rpartition(".")[2]]
    return tuple(dict.fromkeys([*last, *near])) or tuple(Settings.model_fields)


def _from_variables(variables: Mapping[str, str]) -> dict[str, Any]:
    known = set(_paths(Settings))
    tree: dict[str, Any] = {}
    for name, text in sorted(variables.items()):
        path = name.lower().replace("__", ".")
        group, _, key = path.partition("storage.options.")
        if path not in known and not (group == "" and key):
            near = (PREFIX + each.upper().replace(".", "__") for each in _suggestions(path))
            raise UnknownSettingError(PREFIX + name, "the environment", tuple(near))
        *groups, last = path.split(".")
        place = tree
        for each in groups:
            place = place.setdefault(each, {})
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError:
            value = text
        place[last.upper() if groups == ["storage", "options"] else last] = value
    return tree


def _is_secret(name: str, text: str) -> bool:
    """Whether a variable holds a password or a key."""
    if name.startswith("STORAGE__OPTIONS__"):
        return any(word in name for word in ("SECRET", "TOKEN", "PASSWORD", "KEY", "CREDENTIAL"))
    return name.endswith("__URL") and "@" in text and ":" in text.partition("://")[2].rpartition("@")[0]


def _leaves(tree: Mapping[str, Any], default: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        usual = default.get(name)
        if isinstance(value, dict):
            yield from _leaves(value, usual if isinstance(usual, dict) else {}, f"{above}{name.upper()}__")
        elif value != usual:
            text = ",".join(value) if isinstance(value, list) else "" if value is None else str(value)
            yield above + name.upper(), text
