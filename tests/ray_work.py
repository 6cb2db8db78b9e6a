"""What a test sees of the work that is given to Ray."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest


def counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType, over: str) -> list[int]:
    """How many pieces each call of a module's function of this name gives to Ray, from now on."""
    given: list[int] = []
    real = getattr(module, over)

    def counting(task: Any, work: Any, **options: Any) -> Any:
        given.append(len(work))
        return real(task, work, **options)

    monkeypatch.setattr(module, over, counting)
    return given
