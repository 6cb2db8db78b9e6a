"""The program inside the online server that brings live events into streams and rings."""

from __future__ import annotations

from typing import Final

from heliostat.storage.rings import RINGS_AND_BUNDLES
from heliostat.storage.scripts import Script

# Events of one bucket, each atomic by itself. KEYS: the bucket's epoch; then, for each event: seen,
# [stream], [bundle]; ARGV: life of the seen key in ms, number of descriptors, the descriptors; then, for
# each event: number of stream fields (0: no stream), the fields, number of rings (0: no bundle), and for each
# of those the number of its descriptor and its slot. Answers a number an event: 0 known already, 1 applied, 2 too
# old for a ring. The stream comes before the rings: should they fail, the event is history already,
# and materializing repairs them.
APPLY_EVENTS: Final = Script(
    RINGS_AND_BUNDLES
    + """
-- Sums of the columns from `at` to `to`, of which an event has but one that isn't 0.
local function summed(held, new, at, to)
  local parts, from = {}, at
  local found = string.find(new, '[^%z]', at)
  while found and found <= to do
    local column = found - (found - at) % 8
    parts[#parts + 1] = sub(held, from, column - 1)
    parts[#parts + 1] = pack('<d', unpack_f8('<d', held, column) + unpack_f8('<d', new, column))
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
  return pack(
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
        part = pack('<d', held_value + new_value)
      elseif op == 111 then
        part = pack('<d', united(held_value, new_value))
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
  return pack('<d', math.max(unpack_f8('<d', base), tile + 1)) .. merged(operators, base, slot)
end

local remember, n_descriptors, descriptors = ARGV[1], tonumber(ARGV[2]), {}
for i = 1, n_descriptors do
  descriptors[i] = described(ARGV[2 + i])
end
local stamp = (tonumber(redis.call('GET', KEYS[1]) or 0) % 65536) / 262144

-- Where the first slot of those from `low` to before `high` is whose tile isn't before `tile`, and that slot's tile.
local function found(held, low, high, slot_bytes, tile)
  local first, last, found_tile = 0, (high - low) / slot_bytes - 1, nil
  while first <= last do
    local middle = floor((first + last) / 2)
    local held_tile = floor(unpack_f8('<d', held, low + middle * slot_bytes))
    if held_tile < tile then
      first = middle + 1
    else
      last, found_tile = middle - 1, held_tile
    end
  end
  return low + first * slot_bytes, found_tile
end

-- What a slot does to a ring, which is in `held` from `first` to before `past`: what from `from` to before `to`
-- becomes. Nothing, if it is too old.
local function edit(held, first, past, ring, slot)
  local slot_bytes, tile, base_past, reach = ring.slot_bytes, unpack_f8('<d', slot), first, ring.n_slots
  if ring.life then
    base_past, reach = first + slot_bytes, ring.n_slots - 1
  end
  local stamped = pack('<d', tile + stamp) .. sub(slot, 9)
  if first == past or (past - first) % slot_bytes ~= 0 then
    return first, past, ring.none .. stamped
  elseif past == base_past then
    return past, past, stamped
  end
  local at = past - slot_bytes
  local held_tile = floor(unpack_f8('<d', held, at))
  if held_tile < tile then -- of a later tile than any: those beyond the ring's reach leave
    local kept, base = base_past, sub(held, first, base_past - 1)
    while kept < past do
      local old = floor(unpack_f8('<d', held, kept))
      if old > tile - reach then
        break
      end
      if ring.life then
        base = with(base, ring.operators, sub(held, kept, kept + slot_bytes - 1), old)
      end
      kept = kept + slot_bytes
    end
    if kept == base_past then
      return past, past, stamped
    end
    return first, past, base .. sub(held, kept, past - 1) .. stamped
  elseif tile > held_tile - reach then
    if held_tile > tile then
      at, held_tile = found(held, base_past, past, slot_bytes, tile)
    end
    if held_tile ~= tile then
      return at, at, stamped
    end
    local both = merged(ring.operators, sub(held, at, at + slot_bytes - 1), slot)
    return at, at + slot_bytes, sub(stamped, 1, 8) .. both
  elseif ring.life then
    return first, base_past, with(sub(held, first, base_past - 1), ring.operators, slot, tile)
  end
end

-- Writes a bundle with some rings edited and some added; as few bytes of it as it takes.
local function rewrite(key, held, n_held, ids, sizes, edits, added)
  local parts, at, first, resized = {}, 9 + 24 * n_held, nil, #added > 0
  for i = 1, n_held do
    local id = ids[i]
    local each = edits[id]
    if each then
      local size = sizes[id] + #each.bytes - (each.to - each.from)
      parts[#parts + 1], parts[#parts + 2] = sub(held, at, each.from - 1), each.bytes
      first, at = first or each.from, each.to
      resized, sizes[id] = resized or size ~= sizes[id], size
    end
  end
  if not resized then
    for _, each in pairs(edits) do
      redis.call('SETRANGE', key, each.from - 1, each.bytes)
    end
    return
  end
  parts[#parts + 1] = sub(held, at)
  local head, rings = directory(ids, sizes), table.concat(parts) .. table.concat(added)
  if n_held == 0 then
    redis.call('SET', key, head .. rings)
  elseif #added > 0 or #head + #rings < #held then
    redis.call('SET', key, head .. rings, 'KEEPTTL')
  else
    redis.call('SETRANGE', key, 0, head)
    redis.call('SETRANGE', key, first - 1, sub(rings, first - #head))
  end
end

-- Brings an event's slots into a bundle; how many of its rings the event is too old for.
local function update(key, argument, n_rings)
  local held = redis.call('GET', key) or ''
  local ids, begins, sizes = listed(held)
  local n_held, late, edits, added, forever, expire_ms = #ids, 0, {}, {}, false, 0
  if n_held == 0 then
    held = ''
  end
  for pair = argument, argument + 2 * n_rings - 2, 2 do
    local ring, slot = descriptors[tonumber(ARGV[pair])], ARGV[pair + 1]
    local id, first = ring.id, begins[ring.id]
    local size = first and sizes[id] or 0
    local from, to, bytes = edit(held, first or 1, (first or 1) + size, ring, slot)
    if not from then
      late = late + 1
    elseif first then
      edits[id] = {from = from, to = to, bytes = bytes}
    else
      ids[#ids + 1], added[#added + 1], sizes[id] = id, bytes, #bytes
    end
    forever, expire_ms = forever or ring.expire_ms == 0, math.max(expire_ms, ring.expire_ms)
  end
  rewrite(key, held, n_held, ids, sizes, edits, added)
  if #added > 0 or not forever then
    lasting(key, n_held > 0, forever, expire_ms)
  end
  return late
end

local argument, key, outcomes = 3 + n_descriptors, 2, {}
while argument <= #ARGV do
  local n_fields, seen = tonumber(ARGV[argument]), KEYS[key]
  local first = argument + n_fields + 2
  local n_rings = tonumber(ARGV[first - 1])
  local stream = n_fields > 0 and KEYS[key + 1]
  key = key + (stream and 2 or 1)
  local bundle = n_rings > 0 and KEYS[key]
  key, argument = key + (bundle and 1 or 0), first + 2 * n_rings
  local outcome = 0
  if redis.call('SET', seen, '', 'NX', 'PX', remember) then
    if stream then
      local added = redis.pcall('XADD', stream, '*', unpack(ARGV, first - 1 - n_fields, first - 2))
      if type(added) == 'table' and added.err then
        redis.call('DEL', seen)
        return added
      end
    end
    outcome = bundle and update(bundle, first, n_rings) > 0 and 2 or 1
  end
  outcomes[#outcomes + 1] = outcome
end
return outcomes
"""
)
