"""The two programs that run inside the online server: events in, rings from history.

Both know a ring only by its descriptor (`RingDescriptor.pack`), so that one program serves
every view. A ring is a string of slots; a slot is a tile number (f8) and the state's columns
(f8 each, little endian). Of the tile number:

- ``-inf``: the slot is empty;
- with a fraction below 1/4: live events went into it. The fraction is the stamp of its bucket's
  epoch, a count of the materializations that have begun: one that began later than the slot was
  touched has read all that is in it, and may replace it;
- with a larger one: it came from the event log alone, which may fill it again. The fraction grows
  with the instant it was filled for, so that an older view of the log never replaces a newer one.

A ring of kind ``life`` keeps, in slot 0, the base: everything that the later slots no longer
hold. Its tile number is the boundary: no event of a tile at or above it went into the base.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

_HEADER = struct.Struct("<IIdBH")
_WIDTH = struct.Struct("<H")

EPOCHS: Final = 65_536
"""Epochs are counted modulo this; a stamp is the count over four times this."""

_CODES: Final = {"add": b"a", "min": b"n", "max": b"x", "or": b"o", "first": b"f", "last": b"l", "moments": b"m"}
_BINS: Final = b"b"


@dataclass(frozen=True)
class RingDescriptor:
    """What the server must know of a ring's bytes.

    Attributes:
        n_slots: Slots of the ring, the base included.
        life: Whether slot 0 is a base.
        operators: Merge operator and number of columns of each state; ``add`` may have any number.
        empty_slot: The bytes of an empty slot.
        expire_ms: How long after the last write the ring may be dropped; 0: never.
    """

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
        header = _HEADER.pack(self.n_slots, len(self.empty_slot), float(self.expire_ms), self.life, len(operators))
        return header + operators + self.empty_slot


@dataclass(frozen=True)
class Script:
    """A server-side program and the name that the server caches it by."""

    text: str

    @property
    def sha(self) -> str:
        """What EVALSHA calls it."""
        return hashlib.sha1(self.text.encode()).hexdigest()  # noqa: S324 - the protocol's choice, not security


_COMMON = """
local unpack_f8, sub, byte, floor = struct.unpack, string.sub, string.byte, math.floor

local function describe(text)
  local n_slots, slot_bytes, expire_ms, life, n_operators, at = struct.unpack('<I4I4dBI2', text)
  return n_slots, slot_bytes, expire_ms, life == 1, sub(text, at, at + n_operators - 1), sub(text, at + n_operators)
end
"""

# Events of one bucket, each atomic by itself. KEYS: the bucket's epoch; then, for each event: seen,
# [stream], rings…; ARGV: life of the seen key in ms, number of descriptors, the descriptors; then, for
# each event: number of stream fields (0: no stream), the fields, number of rings, and for each of those
# the number of its descriptor and its slot. Answers a number an event: 0 known already, 1 applied, 2 too
# old for a ring. The stream comes before the rings: should a ring fail, the event is history already,
# and materializing repairs the ring.
APPLY_EVENTS: Final = Script(
    _COMMON
    + """
-- Sums of the columns from `at` to `to`, of which an event has but one that isn't 0.
local function summed(held, new, at, to)
  local parts, from = {}, at
  local found = string.find(new, '[^%z]', at)
  while found and found <= to do
    local column = found - (found - at) % 8
    parts[#parts + 1] = sub(held, from, column - 1)
    parts[#parts + 1] = struct.pack('<d', unpack_f8('<d', held, column) + unpack_f8('<d', new, column))
    from = column + 8
    found = string.find(new, '[^%z]', from)
  end
  parts[#parts + 1] = sub(held, from, to)
  return table.concat(parts)
end

-- Sets of up to 52 bits, in halves that the 32-bit operations can take.
local function united(one, other)
  local half = 67108864
  local high, other_high = floor(one / half), floor(other / half)
  return bit.bor(high, other_high) * half + bit.bor(one - high * half, other - other_high * half)
end

-- Count, mean, squared deviations: as heliostat.features.moments.merged.
local function moments(held, new, at)
  local count, mean, squares = unpack_f8('<ddd', held, at)
  local more, more_mean, more_squares = unpack_f8('<ddd', new, at)
  local total, delta = count + more, more_mean - mean
  local share = total > 0 and more / total or 0
  return struct.pack(
    '<ddd', total, mean + delta * share, squares + more_squares + delta * (delta * (count * share))
  )
end

local function merged(operators, held, new)
  local out, at, i = {}, 9, 1
  while i <= #operators do
    local op, width, part = byte(operators, i), 8, nil
    if op == 102 or op == 108 then
      width = 24
      local held_time, held_tie = unpack_f8('<dd', held, at)
      local new_time, new_tie = unpack_f8('<dd', new, at)
      local wins
      if op == 102 then
        wins = new_time < held_time or (new_time == held_time and new_tie < held_tie)
      else
        wins = new_time > held_time or (new_time == held_time and new_tie > held_tie)
      end
      part = sub(wins and new or held, at, at + 23)
    elseif op == 109 then
      width, part = 24, moments(held, new, at)
    elseif op == 98 then
      width = 8 * struct.unpack('<I2', operators, i + 1)
      part, i = summed(held, new, at, at + width - 1), i + 2
    else
      local held_value, new_value = unpack_f8('<d', held, at), unpack_f8('<d', new, at)
      if op == 97 then
        part = struct.pack('<d', held_value + new_value)
      elseif op == 111 then
        part = struct.pack('<d', united(held_value, new_value))
      elseif (op == 110 and new_value < held_value) or (op == 120 and new_value > held_value) then
        part = sub(new, at, at + 7)
      else
        part = sub(held, at, at + 7)
      end
    end
    out[#out + 1], at, i = part, at + width, i + 1
  end
  return table.concat(out)
end

local function into_base(key, operators, slot_bytes, slot, tile)
  local base = redis.call('GETRANGE', key, 0, slot_bytes - 1)
  local boundary = math.max(unpack_f8('<d', base), tile + 1)
  redis.call('SETRANGE', key, 0, struct.pack('<d', boundary) .. merged(operators, base, slot))
end

local stamp = (tonumber(redis.call('GET', KEYS[1]) or 0) % 65536) / 262144

local function update(key, descriptor, slot)
  local n_slots, slot_bytes, expire_ms, life, operators, empty = describe(descriptor)
  local tile = unpack_f8('<d', slot)
  local index = life and 1 + tile % (n_slots - 1) or tile % n_slots
  local offset = index * slot_bytes
  local held = redis.call('GETRANGE', key, offset, offset + slot_bytes - 1)
  if #held < slot_bytes then
    held = empty
    redis.call('SET', key, string.rep(empty, n_slots))
  end
  local late = 0
  local held_tile = floor(unpack_f8('<d', held))
  if held_tile == tile then
    redis.call('SETRANGE', key, offset, struct.pack('<d', tile + stamp) .. merged(operators, held, slot))
  elseif held_tile < tile then
    if life and held_tile > -math.huge then
      into_base(key, operators, slot_bytes, held, held_tile)
    end
    redis.call('SETRANGE', key, offset, struct.pack('<d', tile + stamp) .. sub(slot, 9))
  elseif life then
    into_base(key, operators, slot_bytes, slot, tile)
  else
    late = 1
  end
  if expire_ms > 0 then
    redis.call('PEXPIRE', key, string.format('%.0f', expire_ms))
  end
  return late
end

local remember, argument, key, outcomes = ARGV[1], 3 + tonumber(ARGV[2]), 2, {}
while argument <= #ARGV do
  local n_fields, first_ring = tonumber(ARGV[argument]), key + 1
  local slot = argument + n_fields + 2
  local n_rings = tonumber(ARGV[slot - 1])
  if n_fields > 0 then
    first_ring = key + 2
  end
  local outcome = 0
  if redis.call('SET', KEYS[key], '', 'NX', 'PX', remember) then
    if n_fields > 0 then
      local added = redis.pcall('XADD', KEYS[key + 1], '*', unpack(ARGV, argument + 1, argument + n_fields))
      if type(added) == 'table' and added.err then
        redis.call('DEL', KEYS[key])
        return added
      end
    end
    local late = 0
    for ring = 0, n_rings - 1 do
      local at = slot + 2 * ring
      late = late + update(KEYS[first_ring + ring], ARGV[2 + tonumber(ARGV[at])], ARGV[at + 1])
    end
    outcome = late > 0 and 2 or 1
  end
  outcomes[#outcomes + 1] = outcome
  key, argument = first_ring + n_rings, slot + 2 * n_rings
end
return outcomes
"""
)

# Rings of entities of one bucket, from history. Each entity is atomic, with the memory of its recent
# events' ids. KEYS: the fence; then, for each entity: its rings, its seen keys. ARGV: the token that the
# fence must hold, the epoch, whether history covers all that live events had done before that began ('1'
# or '0'), life of seen keys in ms, number of ring layouts, for each its descriptor and the first tile that
# is still open to late events; then, for each entity: number of rings, number of seen keys, and for each
# ring its layout's number and its bytes ('': no events).
# Tiles before the first open one come from history. An open tile of live events comes from it as well if
# it covers them; else it stays, with all open tiles of the entity, and no id is remembered. Where history
# doesn't cover, what live events or a later history made stays.
# Answers -1 if the fence holds another token; else a number a ring: 0 unchanged, 1 written, 2 left alone
# since its base is ahead, 3 has open tiles that history doesn't cover yet, 4 cleared, 5 isn't there.
WRITE_RINGS: Final = Script(
    _COMMON
    + """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return -1
end
local epoch, covers, remember, layouts = tonumber(ARGV[2]) % 65536, ARGV[3] == '1', ARGV[4], {}
local argument, key, codes = 6, 2, {}
for i = 1, tonumber(ARGV[5]) do
  local n_slots, slot_bytes, expire_ms, life, _, empty = describe(ARGV[argument])
  layouts[i] = {n_slots, slot_bytes, expire_ms, life, string.rep(empty, n_slots), tonumber(ARGV[argument + 1])}
  argument = argument + 2
end

local function composed(layout, held, fresh, frozen)
  local n_slots, slot_bytes, _, life, _, first_live = unpack(layout)
  local slots, first, live, busy = {}, 0, false, false
  if life then
    if unpack_f8('<d', held) > first_live then
      return held, false, false, true
    end
    slots[1], first = sub(fresh, 1, slot_bytes), 1
  end
  for i = first, n_slots - 1 do
    local at = i * slot_bytes + 1
    local held_tile, keep = unpack_f8('<d', held, at), false
    if held_tile >= first_live then
      local fraction = held_tile % 1
      if fraction >= 0.25 then
        keep = frozen or not covers and held_tile > unpack_f8('<d', fresh, at)
      else
        if covers and (fraction * 262144 - epoch) % 65536 < 32768 then
          busy = true
        end
        keep = frozen or not covers and floor(held_tile) >= floor(unpack_f8('<d', fresh, at))
        live = live or keep
      end
    elseif frozen then
      keep = unpack_f8('<d', fresh, at) >= first_live
    end
    slots[i + 1] = sub(keep and held or fresh, at, at + slot_bytes - 1)
  end
  return table.concat(slots), live, busy, false
end

local function put(ring_key, layout, held, ring, cleared)
  local expire_ms = layout[3]
  if cleared and ring == layout[5] then
    if not held then
      return 5
    end
    redis.call('UNLINK', ring_key)
    return 4
  end
  if ring ~= held then
    if expire_ms > 0 then
      redis.call('SET', ring_key, ring, 'PX', string.format('%.0f', expire_ms))
    else
      redis.call('SET', ring_key, ring)
    end
    return 1
  end
  if expire_ms > 0 then
    redis.call('PEXPIRE', ring_key, string.format('%.0f', expire_ms))
  end
  return 0
end

while argument <= #ARGV do
  local n_rings, n_seen = tonumber(ARGV[argument]), tonumber(ARGV[argument + 1])
  local held, fresh, rings, ahead, any_live, any_busy = {}, {}, {}, {}, false, false
  for i = 1, n_rings do
    local layout = layouts[tonumber(ARGV[argument + 2 * i])]
    local found, given = redis.call('GET', KEYS[key + i - 1]), ARGV[argument + 2 * i + 1]
    fresh[i] = given == '' and layout[5] or given
    held[i] = found and #found == #fresh[i] and found
    if not held[i] or held[i] == fresh[i] then
      rings[i] = fresh[i]
    else
      local live, busy
      rings[i], live, busy, ahead[i] = composed(layout, held[i], fresh[i], false)
      any_live, any_busy = any_live or live, any_busy or busy
    end
  end
  for i = 1, n_rings do
    local layout, code = layouts[tonumber(ARGV[argument + 2 * i])], 2
    if any_busy and not ahead[i] then
      rings[i] = composed(layout, held[i] or layout[5], fresh[i], true)
    end
    if not ahead[i] then
      code = put(KEYS[key + i - 1], layout, held[i], rings[i], ARGV[argument + 2 * i + 1] == '')
    end
    codes[#codes + 1] = any_busy and 3 or code
  end
  if not any_live and not any_busy then
    for i = 0, n_seen - 1 do
      redis.call('SET', KEYS[key + n_rings + i], '', 'NX', 'PX', remember)
    end
  end
  key, argument = key + n_rings + n_seen, argument + 2 + 2 * n_rings
end
return codes
"""
)
