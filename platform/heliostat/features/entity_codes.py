"""Small numbers for the entities that rows ask about, and for the events of them. Pure.

Keys are hashed, unless they are integers that lie close together, as those of a database do: then
a table says each one's number, in a tenth of the time.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

_SPREAD = 16  # numbers of the table for each row at most: 128 bytes


class EntityCodes:
    """The distinct keys of some rows, numbered.

    Args:
        keys: Encoded keys of the rows (`Entity.encode`), length ``m``.

    Attributes:
        n: How many distinct keys there are.
        keys: They, by their numbers, length ``n``.
        rows: Each row's number, ``0 ≤ number < n``, shape ``(m,)``.
    """

    def __init__(self, keys: pa.Array) -> None:
        self._low, self._table = 0, np.empty(0, np.int64)
        integers = keys.to_numpy() if len(keys) and pa.types.is_int64(keys.type) else None
        low, high = (0, 0) if integers is None else (int(integers.min()), int(integers.max()))
        self._is_table = integers is not None and high - low < _SPREAD * len(integers)
        if integers is not None and self._is_table:
            asked = np.zeros(high - low + 1, dtype=np.bool_)
            asked[integers - low] = True
            # The number beyond the last one is that of every other key.
            distinct = np.flatnonzero(asked)
            self._low, self.n, self.keys = low, len(distinct), pa.array(distinct + low)
            self._table = np.full(len(asked) + 1, -1)
            self._table[distinct] = np.arange(len(distinct))
            self.rows: IntArray = self._table[integers - low]
        else:
            encoded = keys.dictionary_encode()
            self.keys = encoded.dictionary
            self.n = len(self.keys)
            self.rows = encoded.indices.to_numpy().astype(np.int64)

    def of(self, keys: pa.Array) -> IntArray:
        """The number of each key, -1 where no row has it; shape ``(len(keys),)``."""
        if not self._is_table:
            found: NDArray[np.int32] = pc.fill_null(pc.index_in(keys, value_set=self.keys), -1).to_numpy()
            return found.astype(np.int64)
        # Differences below zero wrap around: as unsigned numbers they are beyond the table as well.
        places = (keys.to_numpy() - self._low).view(np.uint64)
        codes: IntArray = self._table[np.minimum(places, np.uint64(len(self._table) - 1)).view(np.int64)]
        return codes
