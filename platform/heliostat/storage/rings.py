"""Rings as the programs inside the online server see them: one for events, one for rings from history.

Both know a ring only by its descriptor (`RingDescriptor.pack`), so that one program serves
every view. A ring is in its entity's bundle (`heliostat.storage.bundles`), which each program reads
and writes once: a string of slots, those in use alone, in the order of their tiles; a slot
is a tile number (f8) and the state's columns (f8 each, little endian). A tile number's fraction:

- below 1/4: live events went into the slot. The fraction is the stamp of its bucket's epoch, a
  count of the materializations that have begun: one that began later than the slot was touched
  has read all that is in it, and may replace it;
- larger: the slot came from the event log alone, which may fill it again. The fraction grows with
  the instant it was filled for, so that an older view of the log never replaces a newer one.

A ring of kind ``life`` begins with the base: everything that the slots behind it don't hold. Its
tile number is the boundary: no event of a tile at or above it went into the base; ``-inf`` if none did.

A new tile drops those that it puts out of the ring's reach, or adds them to the base.

A bundle lives as long as any of its rings has to: for ever, if one of them does.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

_HEADER = struct.Struct("<16sIIdBH")
_WIDTH = struct.Struct("<H")

EPOCHS: Final = 65_536
"""Epochs are counted modulo this; a stamp is the count over four times this."""

_CODES: Final = {"add": b"a", "min": b"n", "max": b"x", "or": b"o", "first": b"f", "last": b"l", "moments": b"m"}
_BINS: Final = b"b"


@dataclass(frozen=True)
class RingDescriptor:
    """What the server must know of a ring's bytes.

    Attributes:
        ring_id: Which of a bundle's rings it is.
        n_slots: How many tiles it reaches over, and one more if it has a base.
        life: Whether it begins with a base.
        operators: Merge operator and number of columns of each state; ``add`` may have any number.
        empty_slot: The bytes of an empty slot.
        expire_ms: How long after the last write the ring may be dropped; 0: never.
    """

    ring_id: bytes
    n_slots: int
    life: bool
    operators: tuple[tuple[str, int], ...]
    empty_slot: bytes
    expire_ms: int

    def pack(self) -> bytes:
        """The descriptor as the scripts read it."""
        operators = b"".join(
            _BINS + _WIDTH.pack(width) if op == "add" and width > 1 else _CODES[op] for op, width in self.operators
        )
        numbers = self.n_slots, len(self.empty_slot), float(self.expire_ms), self.life, len(operators)
        header = _HEADER.pack(self.ring_id, *numbers)
        return header + operators + self.empty_slot


RINGS_AND_BUNDLES: Final = """
local pack, unpack_f8, sub, byte, floor = struct.pack, struct.unpack, string.sub, string.byte, math.floor

local function described(text)
  local id, n_slots, slot_bytes, expire_ms, life, n_operators, at = struct.unpack('<c16I4I4dBI2', text)
  local operators, empty = sub(text, at, at + n_operators - 1), sub(text, at + n_operators)
  return {
    id = id, n_slots = n_slots, slot_bytes = slot_bytes, expire_ms = expire_ms,
    life = life == 1, operators = operators, none = life == 1 and empty or ''
  }
end

-- A bundle's rings: their ids, in order; and by id where each begins, and how long it is. None, if it isn't a bundle.
local function listed(bundle)
  local ids, begins, sizes = {}, {}, {}
  local count = #bundle < 8 and -1 or unpack_f8('<d', bundle)
  local at = 9 + 24 * count
  if not (count >= 1 and at <= #bundle + 1) then
    return ids, begins, sizes
  end
  for i = 1, count do
    local entry = 24 * i - 15
    local id, size = sub(bundle, entry, entry + 15), unpack_f8('<d', bundle, entry + 16)
    ids[i], begins[id], sizes[id] = id, at, size
    at = at + size
  end
  if at ~= #bundle + 1 then
    return {}, {}, {}
  end
  return ids, begins, sizes
end

-- What a bundle has besides its rings.
local function directory(ids, sizes)
  local parts = {pack('<d', #ids)}
  for i = 1, #ids do
    parts[i + 1] = ids[i] .. pack('<d', sizes[ids[i]])
  end
  return table.concat(parts)
end

-- Lets a bundle live for as long as some of its rings have to; `others` if it has more of them.
local function lasting(key, others, forever, expire_ms)
  local ms = string.format('%.0f', expire_ms)
  if forever then
    redis.call('PERSIST', key)
  elseif expire_ms > 0 and others then
    redis.call('PEXPIRE', key, ms, 'GT') -- what lives for ever goes on doing so
  elseif expire_ms > 0 then
    redis.call('PEXPIRE', key, ms)
  end
end
"""
"""What both programs begin with."""
