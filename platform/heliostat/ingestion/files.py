"""Event files as batches of rows: Parquet, and CSV read as text so that one bad cell costs one row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from heliostat.errors import InvalidValueError, MissingFileError
from heliostat.ingestion.checking import EventCheck

IntArray = NDArray[np.int64]

_PARQUET = (".parquet", ".pq")
_CSV = (".csv", ".csv.gz")
_BLOCK_BYTES = 16_000_000


@dataclass(frozen=True)
class Batch:
    """Some rows of a file.

    Attributes:
        file: Which.
        rows: The source's columns, ``n`` rows.
        numbers: Where each row is in the file, counted from 0, shape ``(n,)``.
        broken: Rows that aren't rows: their number, their text, and what is wrong.
    """

    file: str
    rows: pa.Table
    numbers: IntArray
    broken: tuple[tuple[int, str, str], ...] = ()


def event_files(paths: Sequence[str | Path]) -> list[Path]:
    """The event files that paths name; a folder stands for those in it and below.

    Raises:
        MissingFileError: If a path doesn't exist, or a folder holds no event file.
        InvalidValueError: If a file is of no known format.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if each.is_file() and _format(each) is not None)
            if not inside:
                raise MissingFileError(f"{path}/*", f"put files with {_endings()} into the folder")
            found.extend(inside)
        elif not path.exists():
            raise MissingFileError(str(path))
        elif _format(path) is None:
            raise InvalidValueError("event file", str(path), f"a file name that ends with {_endings()}")
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def read_batches(file: Path, check: EventCheck, *, batch_rows: int) -> Iterator[Batch]:
    """Read a file a batch at a time, in order.

    Args:
        file: One of `event_files`.
        check: Says which columns are needed, and of which types.
        batch_rows: Rows a batch, about.

    Raises:
        SchemaMismatchError: If a column is missing or of a hopeless type.
        InvalidValueError: If the file isn't what its name says.
    """
    reader = _parquet_batches if _format(file) == "parquet" else _csv_batches
    try:
        yield from reader(file, check, batch_rows)
    except (pa.ArrowInvalid, OSError) as error:
        said = str(error).splitlines()[0]
        raise InvalidValueError("event file", str(file), f"a readable {_format(file)} file ({said})") from error


def read_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each read while the one before is worked on."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield batch


def _format(path: Path) -> str | None:
    name = path.name.lower()
    if name.startswith((".", "_")):
        return None
    return "parquet" if name.endswith(_PARQUET) else "csv" if name.endswith(_CSV) else None


def _endings() -> str:
    return ", ".join((*_PARQUET, *_CSV))


def _parquet_batches(file: Path, check: EventCheck, batch_rows: int) -> Iterator[Batch]:
    with pq.ParquetFile(file) as parquet:
        check.require_columns(parquet.schema_arrow, what=str(file))
        begin = 0
        for batch in parquet.iter_batches(batch_size=batch_rows, columns=check.source.given_schema.names):
            yield Batch(str(file), pa.Table.from_batches([batch]), np.arange(begin, begin + batch.num_rows))
            begin += batch.num_rows


def _csv_batches(file: Path, check: EventCheck, batch_rows: int) -> Iterator[Batch]:
    names = check.source.given_schema.names
    if file.stat().st_size == 0:
        raise pa.ArrowInvalid("it is empty; its first line should name the columns")
    skip_all = pacsv.ParseOptions(invalid_row_handler=lambda _: "skip", newlines_in_values=True)
    with pacsv.open_csv(file, parse_options=skip_all) as header:
        # Everything is text here, so only names can be wrong.
        check.require_columns(pa.schema([(name, pa.string()) for name in header.schema.names]), what=str(file))
    broken: list[tuple[int, str, str]] = []

    def skip(row: pacsv.InvalidRow) -> str:
        problem = f"it has {row.actual_columns} cells, and the header {row.expected_columns}"
        broken.append((row.number - 2, row.text, problem))  # counted from 1, header included
        return "skip"

    with pacsv.open_csv(
        file,
        # One thread, so that rows can be counted.
        read_options=pacsv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
        parse_options=pacsv.ParseOptions(invalid_row_handler=skip, newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(
            include_columns=names,
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
        ),
    ) as reader:
        numbering = _Numbering(broken)
        told = 0
        for block in reader:
            table = pa.Table.from_batches([block])
            for begin in range(0, table.num_rows, batch_rows):
                part = table.slice(begin, batch_rows)
                told, news = len(broken), tuple(broken[told:])
                yield Batch(str(file), part, numbering.next(part.num_rows), news)
        if told < len(broken):
            empty = pa.schema([(name, pa.string()) for name in names]).empty_table()
            yield Batch(str(file), empty, np.arange(0), tuple(broken[told:]))


class _Numbering:
    """Row numbers of what is left when broken rows are left out."""

    def __init__(self, broken: list[tuple[int, str, str]]) -> None:
        self._broken, self._next = broken, 0

    def next(self, n: int) -> IntArray:
        """The numbers of the next rows; whatever is broken before them is known by now."""
        skipped = [number for number, _, _ in self._broken if number >= self._next]
        numbers = np.setdiff1d(np.arange(self._next, self._next + n + len(skipped)), skipped)[:n]
        self._next = int(numbers[-1]) + 1 if n else self._next
        return numbers
