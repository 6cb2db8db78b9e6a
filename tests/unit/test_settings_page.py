"""docs/settings.md names every setting, with the default and the words that configs/base.yaml has, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "settings.md").read_text()
_LINE = re.compile(r"^( *)(\w+):(?: +([^#]*?))?(?: +# (.*))?$")
_ROW = re.compile(r"^\| `([a-z][\w.]*)` \| (.*) \| (.*) \| (.*) \|$", re.MULTILINE)


class Written(NamedTuple):
    """A setting as configs/base.yaml states it; `test_settings` holds that file and the code together."""

    path: str
    default: str
    meaning: str

    def row(self, advice: str) -> str:
        meaning = self.meaning.replace("|", "\\|")
        return f"| `{self.path}` | `{self.default}` | {meaning} | {advice} |"


def written() -> list[Written]:
    found, above = [], list[tuple[int, str]]()
    for line in (ROOT / "configs" / "base.yaml").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        assert match, line
        indent, name, default, meaning = len(match[1]), match[2], match[3], match[4]
        above = [each for each in above if each[0] < indent]
        if not default:
            above.append((indent, name))
        else:
            found.append(Written(".".join([*(each for _, each in above), name]), default, meaning))
    return found


ROWS = {path: cells for path, *cells in _ROW.findall(PAGE)}


def test_every_line_of_base_yaml_is_read_here() -> None:
    def leaves(tree: object, above: str = "") -> list[str]:
        if not isinstance(tree, dict) or not tree:
            return [above]
        return [leaf for name, each in tree.items() for leaf in leaves(each, f"{above}.{name}".lstrip("."))]

    base = yaml.safe_load((ROOT / "configs" / "base.yaml").read_text())
    assert [each.path for each in written()] == leaves(base)


def test_the_page_has_every_setting_once_and_no_other() -> None:
    named = [path for path, *_ in _ROW.findall(PAGE)]
    known = {each.path: each.row("WHEN TO CHANGE IT") for each in written()}
    missing = [row for path, row in known.items() if path not in named]
    assert not missing, "docs/settings.md wants a row:\n" + "\n".join(missing)
    assert sorted(named) == sorted(known), "it has a row twice, or of what is no setting"


@pytest.mark.parametrize("setting", written(), ids=lambda each: each.path)
def test_a_row_has_the_default_and_the_words_of_base_yaml_and_says_when_to_change_it(setting: Written) -> None:
    default, meaning, advice = ROWS[setting.path]
    assert f"| `{setting.path}` | {default} | {meaning} | {advice} |" == setting.row(advice)
    assert len(advice) > 7


def test_settings_that_pages_speak_of_exist() -> None:
    paths = {each.path for each in written()}
    tops = {path.partition(".")[0] for path in paths if "." in path}
    for page in ("settings", "operations", "runbook", "ingestion"):
        text = (ROOT / "docs" / f"{page}.md").read_text()
        for name in re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)(?:: [^`]*|:[^`]*)?`", text):
            if name.partition(".")[0] in tops and not name.endswith((".py", ".md", ".yaml")):
                assert any(path == name or path.startswith(f"{name}.") for path in paths), (page, name)
