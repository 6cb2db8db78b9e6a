"""An entity's bundle: all rings that the views over one source keep of it, in one value. Pure.

A bundle is words of eight bytes, little endian: how many rings it has (f8); of each its id (16 bytes) and
its length in bytes (f8); then the rings, in that order. The first half of an id says whose ring it is, the
view's and its version's; the second half says how it is laid out. So whoever writes a view's rings knows
those that it has laid out otherwise before. An entity without rings has no bundle.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

RING_ID_BYTES: Final = 16

_COUNT = struct.Struct("<d")
_ENTRY = struct.Struct("<16sd")
_I8 = np.dtype("<i8")
_F8 = np.dtype("<f8")
_ENTRY_WORDS = _ENTRY.size // _I8.itemsize


def view_id(view_ref: str) -> bytes:
    """What the ids of a view's rings begin with.

    Args:
        view_ref: Of the view and its version.
    """
    return hashlib.blake2b(view_ref.encode(), digest_size=RING_ID_BYTES // 2).digest()


def ring_id(view_ref: str, group: str) -> bytes:
    """The id of a ring in its bundle.

    Args:
        view_ref: Of the view and its version.
        group: The name of the ring's layout.
    """
    return view_id(view_ref) + hashlib.blake2b(group.encode(), digest_size=RING_ID_BYTES // 2).digest()


def directory_bytes(n_rings: int) -> int:
    """What a bundle of so many rings has besides them."""
    return _COUNT.size + n_rings * _ENTRY.size if n_rings else 0


def rings_in(bundle: bytes | None) -> dict[bytes, bytes]:
    """A bundle's rings by id; none where there is no bundle.

    Raises:
        ValueError: If these bytes aren't a bundle.
    """
    if not bundle:
        return {}
    try:
        (count,) = _COUNT.unpack_from(bundle)
        at = directory_bytes(int(count))
        found: dict[bytes, bytes] = {}
        for each, size in _ENTRY.iter_unpack(bundle[_COUNT.size : at]):
            found[each] = bundle[at : at + int(size)]
            at += int(size)
    except (struct.error, ValueError, OverflowError):
        raise ValueError("no bundle of rings") from None
    if at != len(bundle) or len(found) != count:
        raise ValueError("no bundle of rings")
    return found


class RingBytes(NamedTuple):
    """Rings, or bundles of them, of ``n`` entities, one behind the other.

    Attributes:
        data: The bytes of all of them.
        sizes: How many of them each has, shape ``(n,)``; 0: no event is in its reach.
    """

    data: bytes
    sizes: IntArray

    @classmethod
    def none(cls, n_entities: int) -> RingBytes:
        """Of entities without events."""
        return cls(b"", np.zeros(n_entities, dtype=np.int64))

    def split(self) -> list[bytes]:
        """Each ring."""
        ends = np.add.accumulate(self.sizes).tolist()
        return [self.data[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def bundles(ids: Sequence[bytes], rings: Sequence[RingBytes]) -> RingBytes:
    """The bundles of many entities; of an entity without rings, no bytes.

    Args:
        ids: Of the rings that an entity may have, ``n_layouts`` of them.
        rings: For each of those, the rings of all ``n`` entities, whole words each.
    """
    words = np.stack([each.sizes for each in rings]) // _I8.itemsize
    there = words > 0
    counts = there.sum(axis=0)
    heads = np.where(counts > 0, 1 + _ENTRY_WORDS * counts, 0)
    totals = heads + words.sum(axis=0)
    begins = np.cumsum(totals) - totals
    out = np.empty(int(totals.sum()), dtype=_I8)
    some = counts > 0
    out[begins[some]] = counts[some].astype(_F8).view(_I8)
    entry_at, ring_at = begins + 1, begins + heads
    for each, own, used, lengths in zip(ids, rings, there, words, strict=True):
        entries = entry_at[used]
        for word, value in enumerate(np.frombuffer(each, dtype=_I8)):
            out[entries + word] = value
        out[entries + _ENTRY_WORDS - 1] = own.sizes[used].astype(_F8).view(_I8)
        data = np.frombuffer(own.data, dtype=_I8)
        moved = ring_at - (np.cumsum(lengths) - lengths)
        out[np.repeat(moved, lengths) + np.arange(len(data))] = data
        entry_at = entry_at + _ENTRY_WORDS * used
        ring_at = ring_at + lengths
    return RingBytes(out.tobytes(), totals * _I8.itemsize)
