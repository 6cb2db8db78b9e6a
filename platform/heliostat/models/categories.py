"""Categories as a booster takes them: small whole numbers, learned from the rows that it was fitted on. Pure.

A categorical feature's value is the code of a text, a number of 48 bits that every process computes by
itself (`heliostat.schema.text_codes`). A booster wants 0, 1, 2, …: a version keeps the codes that
its training rows held, in order, and a code's place among them is the booster's number. A category that
wasn't there in training is missing for this version, and known to the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import InvalidPackageError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Categories:
    """The codes that a version knows.

    Attributes:
        codes: Ascending, by qualified feature name.
    """

    codes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, codes in self.codes.items():
            if (np.diff(np.array(codes, dtype=np.int64)) <= 0).any():
                raise InvalidPackageError("categories", f"the codes of {name!r} must rise")

    def __bool__(self) -> bool:
        return bool(self.codes)

    @classmethod
    def learned(cls, matrix: FloatArray, names: Sequence[str], categorical: Sequence[str]) -> Categories:
        """The codes that training rows hold.

        Args:
            matrix: Shape ``(n, len(names))``; NaN is null.
            names: Its columns.
            categorical: Those that are categories.
        """
        columns = {name: matrix[:, names.index(name)] for name in categorical}
        return cls(
            {
                name: tuple(np.unique(values[np.isfinite(values)]).astype(np.int64).tolist())
                for name, values in columns.items()
            }
        )

    def encoded(self, matrix: FloatArray, names: Sequence[str]) -> FloatArray:
        """A matrix with codes as the booster's numbers; NaN for those that it doesn't know.

        Args:
            matrix: Shape ``(n, len(names))``. It isn't changed.
            names: Its columns.
        """
        if not self.codes:
            return matrix
        found = matrix.copy()
        for name, codes in self.codes.items():
            column, known = matrix[:, names.index(name)], np.array([*codes, np.inf])
            places = np.searchsorted(known, column)
            hit = known[np.minimum(places, len(codes))] == column
            found[:, names.index(name)] = np.where(hit, places, np.nan)
        return found

    def to_document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {name: list(codes) for name, codes in self.codes.items()}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Categories:
        """The reverse of `to_document`."""
        return cls({name: tuple(codes) for name, codes in document.items()})
