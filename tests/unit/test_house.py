"""The house keeps its shape."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "platform" / "heliostat"


def test_platform_never_becomes_a_package() -> None:
    """A package of that name would shadow the standard library's and break Ray."""
    assert not (ROOT / "platform" / "__init__.py").exists()
    import platform

    assert platform.python_version()


def test_declaring_loads_neither_ray_nor_a_server() -> None:
    heavy = ("ray", "fastapi", "redis", "lightgbm")
    code = f"import heliostat, configs.churn.definitions, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_a_command_that_needs_no_model_doesnt_wait_for_what_models_need() -> None:
    heavy = ("lightgbm", "sklearn", "scipy", "ray.data", "ray.serve", "fastapi")
    code = f"import heliostat.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_what_it_is_for(path: Path) -> None:
    source = path.read_text()
    if path.name == "__init__.py" and path.parent not in (PACKAGE, PACKAGE / "errors", PACKAGE / "client"):
        assert source == "", "packages are folders; only the top one, the errors and the client have a vocabulary"
    else:
        assert ast.get_docstring(ast.parse(source))


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    names = {path.name for path in PACKAGE.rglob("*.py")}
    assert not names & {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}


def test_nothing_unpickles() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py"), *(ROOT / "deployments").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "joblib", "cloudpickle", "dill"} & {name.split(".")[0] for name in names}, path
