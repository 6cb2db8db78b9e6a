from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml

from heliostat.clock import ReplayClock
from heliostat.errors import MissingFileError, SettingsError, UnknownSettingError
from heliostat.settings import Settings, load_settings


def layer(folder: Path, text: str) -> Path:
    path = folder / "layer.yaml"
    path.write_text(text)
    return path


def test_base_yaml_states_every_setting_with_its_default() -> None:
    written = yaml.safe_load(Path("configs/base.yaml").read_text())
    defaults = Settings().model_dump(mode="json")
    defaults["home"] = written["home"]
    assert written == defaults


def test_every_line_of_base_yaml_explains_itself() -> None:
    lines = [line for line in Path("configs/base.yaml").read_text().splitlines() if line.startswith("  ")]
    assert len(lines) > 40
    assert all("#" in line for line in lines)


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    settings = load_settings([layer(tmp_path, "serving: {port: 9000}")], environ={}, base=None)
    assert settings.serving.port == 9000
    assert settings.serving.replicas == Settings().serving.replicas


def test_the_environment_wins_over_files(tmp_path: Path) -> None:
    path = layer(tmp_path, "serving: {port: 9000}\nproject: from_file")
    environ = {"HELIOSTAT_CONFIG": str(path), "HELIOSTAT_SERVING__PORT": "9001", "UNRELATED": "x"}
    settings = load_settings(environ=environ, base=None)
    assert (settings.serving.port, settings.project) == (9001, "from_file")


@pytest.mark.parametrize("name", ["cluster.yaml", "local.yaml"])
def test_shipped_layers_load_and_survive_a_trip_through_the_environment(name: str) -> None:
    settings = load_settings([f"configs/{name}"], environ={})
    assert load_settings(environ=settings.environment()) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_a_mistyped_key_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    with pytest.raises(UnknownSettingError, match=r"serving\.prot.*serving\.port"):
        load_settings([layer(tmp_path, "serving: {prot: 1}")], environ={}, base=None)


def test_a_mistyped_variable_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UnknownSettingError, match="HELIOSTAT_SERVNG__PORT.*HELIOSTAT_SERVING__PORT"):
        load_settings(environ={"HELIOSTAT_SERVNG__PORT": "1"}, base=None)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("serving: {port: many}", "serving.port"),
        ("serving: {port: 70000}", "serving.port"),
        ("serving: 5", "serving"),
        ("ingestion: {lateness: soon}", "ingestion.lateness"),
        ("clock: {kind: replay}", "replay_from"),
        ("clock: {kind: replay, replay_from: yesterday}", "replay_from"),
        ("online: {url: 'http://host'}", "redis://host"),
        ("training: {instants: [soon]}", "training.instants"),
        ("project: 'a b'", "project"),
        ("- a list", "not settings by name"),
        ("a: [", "no YAML"),
    ],
)
def test_a_wrong_value_is_refused_and_named(tmp_path: Path, text: str, names: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings([layer(tmp_path, text)], environ={}, base=None)
    assert names in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(MissingFileError, match="--config"):
        load_settings(["nowhere.yaml"], environ={}, base=None)


def test_object_store_options_come_from_the_environment_in_upper_case() -> None:
    settings = load_settings(environ={"HELIOSTAT_STORAGE__OPTIONS__AWS_REGION": "eu"}, base=None)
    assert settings.storage.options == {"AWS_REGION": "eu"}


SECRETS = {
    "HELIOSTAT_STORAGE__OPTIONS__AWS_SECRET_ACCESS_KEY": "s3cret",
    "HELIOSTAT_STORAGE__OPTIONS__AWS_SESSION_TOKEN": "s3cret",
    "HELIOSTAT_ONLINE__URL": "rediss://:s3cret@cache:6379",
    "HELIOSTAT_CATALOG__URL": "postgresql+psycopg://me:s3cret@db/catalog",
}


def test_secrets_are_in_no_text_of_the_settings_and_in_no_environment_that_is_written_down() -> None:
    plain = {"HELIOSTAT_STORAGE__OPTIONS__AWS_REGION": "eu", "HELIOSTAT_STORAGE__ROOT": "s3://bucket/data"}
    settings = load_settings(environ=SECRETS | plain, base=None)
    assert "s3cret" not in f"{settings!r} {settings}"
    told = settings.environment(secrets=False)
    assert not [name for name, text in told.items() if "s3cret" in text]
    assert plain.items() <= told.items()
    assert load_settings(environ=settings.environment(), base=None) == settings


@pytest.mark.parametrize(
    "variable",
    [("HELIOSTAT_ONLINE__URL", "http://:s3cret@cache"), ("HELIOSTAT_STORAGE__OPTIONS__AWS_SECRET", "[s3cret]")],
)
def test_a_wrong_value_that_may_be_secret_is_refused_without_repeating_it(variable: tuple[str, str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ=dict([variable]), base=None)
    assert "s3cret" not in str(caught.value)


def test_paths_of_local_stores_follow_the_home(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert settings.data_root == str(tmp_path / "data")
    assert settings.catalog_url.endswith("catalog.db")
    assert settings.home.is_absolute()


def test_a_replay_setting_opens_a_replay_clock(tmp_path: Path) -> None:
    settings = load_settings(["configs/local.yaml"], environ={"HELIOSTAT_HOME": str(tmp_path)})
    clock = settings.open_clock()
    assert isinstance(clock, ReplayClock)
    assert (tmp_path / "clock.json").exists()


def test_the_ladders_rungs_come_from_a_list_or_a_text_and_may_be_none(tmp_path: Path) -> None:
    environ = {"HELIOSTAT_SERVING__FALLBACK": "prior, control", "HELIOSTAT_SERVING__FEATURE_FALLBACK": ""}
    found = load_settings(environ=environ, base=None, home=tmp_path)
    assert (found.serving.fallback, found.serving.feature_fallback) == (("prior", "control"), ())
    assert load_settings(environ=found.environment(), base=None).serving == found.serving
    with pytest.raises(SettingsError, match=r"serving\.fallback"):
        load_settings(environ={"HELIOSTAT_SERVING__FALLBACK": "luck"}, base=None, home=tmp_path)
