"""The two programs that run inside the online server: events in, rings from history.

Both know a ring only by its descriptor (`RingDescriptor.pack`), so that one program serves
every view. A ring is a string of slots, those in use alone, in the order of their tiles; a slot
is a tile number (f8) and the state's columns (f8 each, little endian). A tile number's fraction:

- below 1/4: live events went into the slot. The fraction is the stamp of its bucket's epoch, a
  count of the materializations that have begun: one that began later than the slot was touched
  has read all that is in it, and may replace it;
- larger: the slot came from the event log alone, which may fill it again. The fraction grows with
  the instant it was filled for, so that an older view of the log never replaces a newer one.

A ring of kind ``life`` begins with the base: everything that the slots behind it don't hold. Its
tile number is the boundary: no event of a tile at or above it went into the base; ``-inf`` if none did.

A new tile drops those that it puts out of the ring's reach, or adds them to the base.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from heliostat.storage.scripts import Script

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
        n_slots: How many tiles it reaches over, and one more if it has a base.
        life: Whether it begins with a base.
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

local function with(base, operators, slot, tile)
  return struct.pack('<d', math.max(unpack_f8('<d', base), tile + 1)) .. merged(operators, base, slot)
end

local stamp = (tonumber(redis.call('GET', KEYS[1]) or 0) % 65536) / 262144

-- A slot of a later tile than any of the ring's: the ones beyond its reach leave.
local function append(key, size, from, slot, tile, reach, slot_bytes, operators)
  local kept, base = from, from > 0 and redis.call('GETRANGE', key, 0, from - 1) or ''
  while kept < size do
    local held_tile = floor(unpack_f8('<d', redis.call('GETRANGE', key, kept, kept + 7)))
    if held_tile > tile - reach then
      break
    end
    if from > 0 then
      base = with(base, operators, redis.call('GETRANGE', key, kept, kept + slot_bytes - 1), held_tile)
    end
    kept = kept + slot_bytes
  end
  if kept == from then
    redis.call('APPEND', key, slot)
  else
    redis.call('SET', key, base .. redis.call('GETRANGE', key, kept, -1) .. slot)
  end
end

-- Offset of the first slot of a ring whose tile isn't before `tile`, and that slot's tile.
local function found(key, from, size, slot_bytes, tile)
  local low, high, found_tile = 0, (size - from) / slot_bytes - 1, nil
  while low <= high do
    local middle = floor((low + high) / 2)
    local at = from + middle * slot_bytes
    local held_tile = floor(unpack_f8('<d', redis.call('GETRANGE', key, at, at + 7)))
    if held_tile < tile then
      low = middle + 1
    else
      high, found_tile = middle - 1, held_tile
    end
  end
  return from + low * slot_bytes, found_tile
end

local function update(key, descriptor, slot)
  local n_slots, slot_bytes, expire_ms, life, operators, empty = describe(descriptor)
  local tile, late, from, reach = unpack_f8('<d', slot), 0, 0, n_slots
  if life then
    from, reach = slot_bytes, n_slots - 1
  end
  local stamped = struct.pack('<d', tile + stamp) .. sub(slot, 9)
  local size = redis.call('STRLEN', key)
  if size == 0 or size % slot_bytes ~= 0 then
    redis.call('SET', key, (life and empty or '') .. stamped)
  elseif size == from then
    redis.call('APPEND', key, stamped)
  else
    local at = size - slot_bytes
    local held_tile = floor(unpack_f8('<d', redis.call('GETRANGE', key, at, at + 7)))
    if held_tile < tile then
      append(key, size, from, stamped, tile, reach, slot_bytes, operators)
    elseif tile > held_tile - reach then
      if held_tile > tile then
        at, held_tile = found(key, from, size, slot_bytes, tile)
      end
      if held_tile == tile then
        local held = redis.call('GETRANGE', key, at, at + slot_bytes - 1)
        redis.call('SETRANGE', key, at, sub(stamped, 1, 8) .. merged(operators, held, slot))
      else
        local before = at > 0 and redis.call('GETRANGE', key, 0, at - 1) or ''
        redis.call('SET', key, before .. stamped .. redis.call('GETRANGE', key, at, -1))
      end
    elseif life then
      redis.call('SETRANGE', key, 0, with(redis.call('GETRANGE', key, 0, from - 1), operators, slot, tile))
    else
      late = 1
    end
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
# events' ids. Entities come as columns: each has a ring of each layout. KEYS: the fence; the rings of the
# first layout, an entity's after the other; those of the second one, …; then entity by entity their seen
# keys. ARGV: the token that the fence must hold, the epoch, whether history covers all that live events had
# done before that began ('1' or '0'), life of seen keys in ms, number of layouts, for each its descriptor and
# the first tile that is still open to late events; the number of entities; each one's number of seen keys (I4
# each, or '' if there are none at all); the size of each ring in the order of their keys (I4 each, 0: no
# events); then for each layout the bytes of its rings, one behind the other.
# Tiles before the first open one come from history. An open tile of live events comes from it as well if
# it covers them; else it stays, with all open tiles of the entity, and no id is remembered. Where history
# doesn't cover, what live events or a later history made stays.
# Answers -1 if the fence holds another token, and 1 if none of the rings was there, so that those with events
# are now; else a number a ring, in their order: 0 unchanged, 1 written, 2 left alone since its base is ahead,
# 3 has open tiles that history doesn't cover yet, 4 cleared, 5 isn't there.
WRITE_RINGS: Final = Script(
    _COMMON
    + """
local keys, given = KEYS, ARGV
if redis.call('GET', keys[1]) ~= given[1] then
  return -1
end
local epoch, covers, remember, n_layouts = tonumber(given[2]) % 65536, given[3] == '1', given[4], tonumber(given[5])
local layouts, head, codes = {}, 5, {}
for i = 1, n_layouts do
  local _, slot_bytes, expire_ms, life, _, empty = describe(given[head + 1])
  layouts[i], head = {slot_bytes, expire_ms, life and empty or '', tonumber(given[head + 2])}, head + 2
end
local n_entities, seen_counts, sizes, given_rings = tonumber(given[head + 1]), given[head + 2], given[head + 3], {}
for i = 1, n_layouts do
  local data, at, before = given[head + 3 + i], 1, (i - 1) * n_entities
  local each = {struct.unpack('<' .. string.rep('I4', n_entities), sizes, 4 * before + 1)}
  for entity = 1, n_entities do
    local to = at + each[entity]
    given_rings[before + entity], at = sub(data, at, to - 1), to
  end
end

-- Offset of the first slot from `first_live` on; searched from the end, where there are few.
local function opens(ring, from, slot_bytes, first_live)
  local at = #ring - slot_bytes + 1
  while at > from and unpack_f8('<d', ring, at) >= first_live do
    at = at - slot_bytes
  end
  return at + slot_bytes
end

local function composed(layout, held, fresh, frozen)
  local slot_bytes, _, none, first_live = unpack(layout)
  if #none > 0 and unpack_f8('<d', held) > first_live then
    return held, false, false, true
  end
  local live, busy, at = false, false, opens(held, #none, slot_bytes, first_live)
  local fresh_at = opens(fresh, #none, slot_bytes, first_live)
  local slots = {sub(fresh, 1, fresh_at - 1)}
  if covers or frozen then
    for slot = at, #held, slot_bytes do
      local fraction = unpack_f8('<d', held, slot) % 1
      busy = busy or covers and fraction < 0.25 and (fraction * 262144 - epoch) % 65536 < 32768
      live = live or frozen and fraction < 0.25
    end
    slots[2] = frozen and sub(held, at) or sub(fresh, fresh_at)
    return table.concat(slots), live, busy, false
  end
  while at <= #held or fresh_at <= #fresh do
    local held_tile = at <= #held and unpack_f8('<d', held, at) or math.huge
    local fresh_tile = fresh_at <= #fresh and unpack_f8('<d', fresh, fresh_at) or math.huge
    local is_live, ahead = held_tile % 1 < 0.25, floor(held_tile) - floor(fresh_tile)
    if ahead < 0 or ahead == 0 and (is_live or held_tile > fresh_tile) then
      slots[#slots + 1] = sub(held, at, at + slot_bytes - 1)
      live = live or is_live
    else
      slots[#slots + 1] = sub(fresh, fresh_at, fresh_at + slot_bytes - 1)
    end
    at = ahead <= 0 and at + slot_bytes or at
    fresh_at = ahead >= 0 and fresh_at + slot_bytes or fresh_at
  end
  return table.concat(slots), live, false, false
end

local function put(ring_key, layout, held, ring, cleared)
  local expire_ms = layout[2]
  if cleared and ring == layout[3] then
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

-- Whether none of some entities' rings was there; if so, those with events are now.
local function added(first, last)
  local rings, absent, n, n_absent = {}, {}, 0, 0
  for before = 0, (n_layouts - 1) * n_entities, n_entities do
    for at = before + first, before + last do
      local ring = given_rings[at]
      if ring == '' then
        n_absent = n_absent + 1
        absent[n_absent] = keys[at + 1]
      else
        rings[n + 1], rings[n + 2] = keys[at + 1], ring
        n = n + 2
      end
    end
  end
  if n_absent > 0 and redis.call('EXISTS', unpack(absent)) > 0 then
    return false
  end
  if n > 0 and redis.call('MSETNX', unpack(rings)) == 0 then
    return false
  end
  for i = 1, n_layouts do
    local expire_ms, before = layouts[i][2], (i - 1) * n_entities
    if expire_ms > 0 then
      for at = before + first, before + last do
        if given_rings[at] ~= '' then
          redis.call('PEXPIRE', keys[at + 1], string.format('%.0f', expire_ms))
        end
      end
    end
  end
  return true
end

-- Brings an entity's beside what is there; whether live events' open tiles stayed.
local function replaced(entity)
  local held, fresh, rings, ahead, any_live, any_busy = {}, {}, {}, {}, false, false
  for i = 1, n_layouts do
    local layout, at = layouts[i], (i - 1) * n_entities + entity
    local found, ring = redis.call('GET', keys[at + 1]), given_rings[at]
    fresh[i] = ring == '' and layout[3] or ring
    held[i] = found and #found > 0 and #found % layout[1] == 0 and found
    if not held[i] or held[i] == fresh[i] then
      rings[i] = fresh[i]
    else
      local live, busy
      rings[i], live, busy, ahead[i] = composed(layout, held[i], fresh[i], false)
      any_live, any_busy = any_live or live, any_busy or busy
    end
  end
  for i = 1, n_layouts do
    local layout, at, code = layouts[i], (i - 1) * n_entities + entity, 2
    if any_busy and not ahead[i] then
      rings[i] = composed(layout, held[i] or layout[3], fresh[i], true)
    end
    if not ahead[i] then
      code = put(keys[at + 1], layout, held[i], rings[i], given_rings[at] == '')
    end
    codes[at] = any_busy and 3 or code
  end
  return any_live or any_busy
end

local function remembered(first, last)
  for at = first, last do
    redis.call('SET', keys[at], '', 'NX', 'PX', remember)
  end
end

local seen = 2 + n_layouts * n_entities
if added(1, n_entities) then
  remembered(seen, #keys)
  return 1
end
for at = 1, n_layouts * n_entities do
  codes[at] = given_rings[at] == '' and 5 or 1
end
for entity = 1, n_entities do
  local n_seen = seen_counts == '' and 0 or struct.unpack('<I4', seen_counts, 4 * entity - 3)
  if added(entity, entity) or not replaced(entity) then
    remembered(seen, seen + n_seen - 1)
  end
  seen = seen + n_seen
end
return codes
"""
)
