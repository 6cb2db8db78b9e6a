"""Which rows, keys and texts are about one entity, wherever it is written down. Pure.

An entity's key may stand as columns of a row, as text, as a part of another entity's key (a user's
device), or somewhere in an event that was rejected because it can't be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.errors import HeliostatError
from heliostat.features.definitions import Entity
from heliostat.schema import arrow_type, cast_column

BoolArray = NDArray[np.bool_]


class Subject:
    """One entity, by its key.

    Args:
        entity: Whose key it is.
        text: The key as `Entity.text` writes it.

    Attributes:
        parts: Its key columns.
        encoded: Its key as `Entity.encode` gives it, length 1.

    Raises:
        InvalidValueError: If the text is no key of the entity.
    """

    def __init__(self, entity: Entity, text: str) -> None:
        self.entity, self.text = entity, text
        self.parts = entity.parse(text)
        self.encoded: pa.Array = entity.encoded([text])

    def is_meant(self, owner: Entity | None, text: str) -> bool:
        """Whether the text of a key means it, or has it as a part.

        Args:
            owner: Whose key the text is; None: nobody knows any more.
            text: As `Entity.text` writes it.
        """
        if owner is None or owner.name == self.entity.name:
            return text == self.text
        if not self.has_columns((owner,), owner.key_columns):
            return False
        try:
            found = owner.parse(text)
        except HeliostatError:
            return False
        return all(found[column] == value for column, value in self.parts.items())

    def has_columns(self, owners: Sequence[Entity], columns: Sequence[str]) -> bool:
        """Whether columns of these names are its key, and not that of another entity with the same names.

        Args:
            owners: The entities that the rows are about, as far as they are known.
            columns: All columns of the rows.
        """
        if not set(self.parts) <= set(columns):
            return False
        if any(each.name == self.entity.name for each in owners):
            return True
        return not any(set(each.key_columns) == set(self.parts) for each in owners)

    def rows(self, rows: pa.Table) -> BoolArray:
        """Rows whose key columns hold its key, shape ``(n,)``."""
        same = np.ones(rows.num_rows, dtype=np.bool_)
        for column, value in self.parts.items():
            dtype = arrow_type(self.entity.keys[column])
            try:
                found = pc.equal(cast_column(rows.column(column), dtype), pa.scalar(value, dtype))
            except pa.ArrowException:  # another type can't hold the key
                return np.zeros(rows.num_rows, dtype=np.bool_)
            same &= pc.fill_null(found, False).to_numpy()
        return same

    def is_in_letter(self, event: str) -> bool:
        """Whether an event that nobody could read is about it: by its key columns, or else by its whole text."""
        try:
            document = json.loads(event)
        except ValueError:
            document = None
        if isinstance(document, dict) and all(document.get(column) is not None for column in self.parts):
            return all(_same(document[column], value) for column, value in self.parts.items())
        return all(
            re.search(rf"(?<![\w]){re.escape(str(value))}(?![\w])", event) is not None
            for value in self.parts.values()
        )


def rows_by_text(rows: pa.Table, *, column: str, meant: Callable[[str], bool]) -> BoolArray:
    """Rows whose text is meant, shape ``(n,)``; each distinct text is looked at once, and null is never meant."""
    texts = rows.column(column).combine_chunks().dictionary_encode()
    wanted = np.array([text is not None and meant(text) for text in texts.dictionary.to_pylist()] + [False])
    found: BoolArray = wanted[texts.indices.fill_null(len(wanted) - 1).to_numpy()]
    return found


def _same(found: object, wanted: int | str) -> bool:
    if isinstance(wanted, int) and isinstance(found, float | int) and not isinstance(found, bool):
        return found == wanted
    return str(found) == str(wanted)
