"""What was measured side by side, in one table: the results of all benchmarks -> docs/compared.md.

python benchmarks/compared.py           # writes the table anew; nothing is measured
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pages import Row, between, markdown, result, rewrite
from benchmarks.peers import RESULTS, ROOT, shown
from benchmarks.serving import GOALS

PAGE = ROOT / "docs" / "compared.md"
BEGIN, END = "<!-- measured: written by benchmarks/compared.py -->", "<!-- end -->"
HEADS = ("what", "Heliostat", "beside it", "", "times as quick", "goal", "reached")


@dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes:
        what: In words.
        ours: Seconds or milliseconds; in general what is better when it is smaller.
        peer: Its name.
        theirs: The same for it, or why there is none.
        unit: Of both.
        goal: How many times as quick we want to be; None: nobody has said.
        measured: How many times as quick we were, where that was measured turn by turn.
    """

    what: str
    ours: float
    peer: str
    theirs: float | str
    unit: str
    goal: float | None = None
    measured: float | None = None

    def cells(self) -> list[str]:
        """As the table shows it."""
        theirs = self.theirs if isinstance(self.theirs, str) else f"{shown(self.theirs)} {self.unit}"
        times = self.measured
        if times is None and not isinstance(self.theirs, str):
            times = self.theirs / self.ours
        reached = "" if times is None or self.goal is None else "yes" if times >= self.goal else "no"
        goal = "" if self.goal is None else f"≥ {shown(self.goal)}"
        ours = f"{shown(self.ours)} {self.unit}"
        return [self.what, ours, self.peer, theirs, "" if times is None else shown(times), goal, reached]


def online_read(rows: list[Row]) -> Iterator[Line]:
    """Feature vectors, beside Feast's SDK."""
    for entities, goal in ((100, 10.0), (1, 2.0)):
        here = [row for row in rows if row["entities"] == entities and row["features"] == 10]
        by_reader = {row["reader"]: row for row in here if row["views"] == 1}
        ours, theirs = (by_reader[name] for name in ("Heliostat, rings merged", "Feast, get_online_features"))
        what = f"read 10 features of {entities} {'entities' if entities > 1 else 'entity'} online"
        yield Line(f"{what}, median", ours["p50 ms"], "Feast", theirs["p50 ms"], "ms", goal)
        yield Line(f"{what}, p99", ours["p99 ms"], "Feast", theirs["p99 ms"], "ms", goal if entities > 1 else None)


def feast_join(rows: list[Row]) -> Iterator[Line]:
    """Historical features, beside Feast's default offline store."""
    for row in rows:
        if row["contender"] == "Feast" or row["question"] != "newest row":
            continue
        same = ("rows at rest", "spine rows", "users")
        feast = next((each for each in rows if each["contender"] == "Feast" and _equal(each, row, same)), None)
        if feast is not None:
            size = f"{row['rows at rest']:,} × {row['spine rows']:,}, {row['users']:,} users"
            what = f"historical features, {size} ({row['contender'].removeprefix('Heliostat').strip(', ')})"
            yield Line(what, row["seconds"], "Feast", feast["seconds"], "s", 10.0)
            if not isinstance(feast["seconds"], str):
                by_file = "s, file to file"
                yield Line(f"{what}, file to file", row[by_file], "Feast", feast[by_file], "s")


def materialization(rows: list[Row]) -> Iterator[Line]:
    """History brought online, beside Feast's."""
    by_name = {row["contender"]: row for row in rows}
    # What each wrote: Feast writes a row for those, too, who have nothing in the windows.
    ms = {name: 1e6 / row["entity rows/s"] for name, row in by_name.items()}
    theirs = ms["Feast, materialize"]
    for name in ("Heliostat on Ray", "Heliostat, one process"):
        who = name.removeprefix("Heliostat").strip(", ")
        yield Line(f"materialize ten features of 1,000 entities ({who})", ms[name], "Feast", theirs, "ms", 10.0)


def point_in_time(rows: list[Row]) -> Iterator[Line]:
    """The point-in-time join, beside DuckDB and Ray Data."""
    ours = next(row["seconds"] for row in rows if row["contender"] == "Heliostat")
    goals = {"DuckDB, range join": 1 / 0.3, "Ray Data": 10.0}
    for row in rows:
        name = row["contender"]
        if not name.startswith("Heliostat"):
            yield Line("windows over events, point in time", ours, name, row["seconds"], "s", goals.get(name))


def serving(rows: list[Row]) -> Iterator[Line]:
    """The whole inference graph, beside a plain program."""
    for row in rows:
        entities, concurrency = row["entities"], row["concurrency"]
        pace, theirs = (1e3 / row[f"req/s {who}"] for who in ("Heliostat", "plain"))
        what = f"predict, {entities} {'entity' if entities == 1 else 'entities'}, {concurrency} at once"
        goal = GOALS.get(("plain", entities, concurrency))
        yield Line(f"{what}, a request every", pace, "plain FastAPI", theirs, "ms", goal, row["req/s ratio"])
        if concurrency > 1:
            yield Line(f"{what}, p99", row["p99 ms Heliostat"], "plain FastAPI", row["p99 ms plain"], "ms", 1.0)


def scoring_servers(rows: list[Row]) -> Iterator[Line]:
    """A model whose features the request brings, beside BentoML and MLflow: time a request, and its p99."""
    for row in rows:
        if row["server"] not in ("BentoML", "MLflow"):
            continue
        same = ("rows", "concurrency")
        ours = next(each for each in rows if each["server"] == "Heliostat" and _equal(each, row, same))
        size = f"{row['rows']} {'row' if row['rows'] == 1 else 'rows'}, {row['concurrency']} at once"
        what = f"score {size}, features in the request"
        pace, theirs = (1e3 / each["req/s"] for each in (ours, row))
        quick, late = (ours[f"{each} over {row['server']}"] for each in ("req/s", "p99"))
        yield Line(f"{what}, a request every", pace, row["server"], theirs, "ms", 1.0, quick)
        yield Line(f"{what}, p99", ours["p99 ms"], row["server"], row["p99 ms"], "ms", 1.0, 1 / late)


SECTIONS: Mapping[str, Callable[[list[Row]], Iterator[Line]]] = {
    "online_read": online_read,
    "feast_join": feast_join,
    "materialization": materialization,
    "point_in_time": point_in_time,
    "serving": serving,
    "scoring_servers": scoring_servers,
}


def _equal(one: Row, other: Row, columns: tuple[str, ...]) -> bool:
    return all(one[column] == other[column] for column in columns)


def table(folder: Path = RESULTS) -> str:
    """The table in Markdown, of those benchmarks that have a result."""
    there = {name: lines for name, lines in SECTIONS.items() if (folder / f"{name}.json").exists()}
    cells = (line.cells() for name, lines in there.items() for line in lines(result(name, folder)))
    return markdown([HEADS, *cells])


def written(page: str, folder: Path = RESULTS) -> str:
    """A page with its table as the results have it."""
    return between(page, BEGIN, END, table(folder))


def main() -> int:
    """Run as a program."""
    rewrite(PAGE, written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
