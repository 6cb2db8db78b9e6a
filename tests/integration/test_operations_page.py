"""What docs/operations.md says is so: its settings are settings, its commands run."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from heliostat import cli
from heliostat.settings import ClockSettings, OnlineSettings, Settings, load_settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", _blocks("yaml"))
def test_every_settings_block_is_understood(block: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(block)
    settings = load_settings([tmp_path / "settings.yaml"], environ={}, home=tmp_path)
    assert settings != Settings(home=tmp_path) or "parity" in block, "the parity block repeats the defaults"


def test_every_command_runs(
    home: Path, valkey: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(
        project=f"o{home.name}",
        home=home,
        online=OnlineSettings(url=valkey),
        clock=ClockSettings(kind="replay", replay_from="1998-07-01"),
    )
    for name, value in (settings.environment() | {"HELIOSTAT_STORAGE__RETENTION": "400d"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    commands = [line for block in _blocks("bash") for line in block.splitlines()]
    codes = {}
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        codes[command] = int(str(ended.value.code))
    said = capsys.readouterr()
    # The churn example has lifetime features, and so refuses to lose its history.
    refused = codes.pop("heliostat prune")
    assert (refused, "still needed" in said.err) == (5, True)
    assert codes.pop("heliostat replay-prediction PREDICTION_ID") == 4  # nobody has made it
    assert set(codes.values()) == {0}, (codes, said.err)
    assert {"heliostat forget customer 4711", "heliostat prune --keep 400d --force"} <= codes.keys()
