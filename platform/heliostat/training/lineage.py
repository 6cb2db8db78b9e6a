"""What a version was made from: rows, settings, trials, code and packages."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from heliostat.settings import TrainingSettings
from heliostat.training.dataset import TrainingSet
from heliostat.training.fitting import Trial

_RECORDED_PACKAGES = ("heliostat", "lightgbm", "numpy", "pyarrow", "ray")


def lineage_of(
    training_set: TrainingSet, settings: TrainingSettings, trials: Sequence[Trial], *, compared_with: int | None
) -> dict[str, Any]:
    """All that a version was made from, but the definitions' hashes: those the registry adds.

    Args:
        training_set: Its rows.
        settings: How it was trained.
        trials: Of the search, best first.
        compared_with: The production version that its gate compared it with.
    """
    return {
        **training_set.origin(),
        "fingerprint": training_set.fingerprint,
        "rows": {"train": len(training_set.training), "validation": len(training_set.validation)},
        "training": settings.model_dump(mode="json"),
        "trials": [trial.as_dict() for trial in trials],
        "compared_with": compared_with,
        "code": code_revision(Path(__file__).parent),
        "packages": {name: _installed(name) for name in _RECORDED_PACKAGES},
        "python": platform.python_version(),
    }


def code_revision(folder: Path) -> str | None:
    """The git commit of a folder, with ``+changes`` if files differ from it; None where git can't say."""
    git = shutil.which("git")
    if git is None:
        return None
    answers = []
    for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        found = subprocess.run(  # noqa: S603 - fixed arguments
            [git, "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
        if found.returncode != 0:
            return None
        answers.append(found.stdout.strip())
    return answers[0] + ("+changes" if answers[1] else "")


def _installed(package: str) -> str | None:
    try:
        return installed_version(package)
    except ImportError:
        return None
