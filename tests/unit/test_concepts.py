"""docs/concepts.md: what its examples say is so."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import orjson
import pytest

from heliostat.models.definitions import Definitions, Label, ModelSpec
from heliostat.serving.requests import parse_predict
from heliostat.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"


class Nothing:
    """An online store that holds nothing, and counts reads."""

    def __init__(self) -> None:
        self.reads = 0

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        self.reads += 1
        return [None] * len(keys)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """All examples of the page as one module, in its order."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "concepts.md").read_text(), re.DOTALL)
    file = tmp_path_factory.mktemp("concepts") / "concepts_example.py"
    file.write_text("\n".join(["from __future__ import annotations", *blocks]))
    spec = importlib.util.spec_from_file_location("concepts_example", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.store, module.settings = Nothing(), Settings()  # type: ignore[attr-defined]
    sys.modules["concepts_example"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["concepts_example"]


def test_the_examples_of_the_page_run_and_read_once(example: ModuleType) -> None:
    assert example.store.reads == 1
    assert example.vectors.names[-1] == "shops__turnover_1d"


def test_the_request_of_the_page_is_one_that_is_taken(example: ModuleType) -> None:
    label = Label.any_within("again", example.payments, "7d")
    model = ModelSpec("fraud", example.card, [example.spending, example.account], label)
    asked = parse_predict(
        orjson.dumps(example.request), Definitions.of([model]), overridable=lambda _: frozenset(), max_entities=5
    )
    assert asked.inputs[0] == {"amount": 120.0}
    assert model.categorical == ("spending__last_country", "account__home")


def test_every_link_to_a_decision_leads_somewhere() -> None:
    links = re.findall(r"\]\((adr/[^)]+)\)", (DOCS / "concepts.md").read_text())
    assert links
    assert all((DOCS / link).exists() for link in links)
