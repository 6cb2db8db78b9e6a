"""Pages of docs/ with tables that are written from the benchmarks' results: what they share. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import ROOT

Row = Mapping[str, Any]
"""A row of a result by its column."""


def result(name: str, folder: Path) -> list[Row]:
    """A result's rows."""
    found = json.loads((folder / f"{name}.json").read_text())
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first line is its head."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def between(page: str, begin: str, end: str, text: str) -> str:
    """A page with a text between two marks, instead of what was there; as it is if it hasn't got the first."""
    head, found, rest = page.partition(begin)
    return f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}" if found else page


def rewrite(page: Path, written: Callable[[str], str]) -> None:
    """Write a page anew, and say so."""
    page.write_text(written(page.read_text()))
    print(f"written to {page.relative_to(ROOT)}")
