"""The program inside the online server that brings rings from history beside what live events made."""

from __future__ import annotations

from typing import Final

from heliostat.storage.rings import RINGS_AND_BUNDLES
from heliostat.storage.scripts import Script

# Rings of entities of one bucket, from history. Each entity is atomic, with the memory of its recent
# events' ids. KEYS: the fence; the entities' bundles; then entity by entity their seen keys. ARGV: the token
# that the fence must hold, the epoch, whether history covers all that live events had done before that began
# ('1' or '0'), life of seen keys in ms, ids of other views whose rings go, number of layouts, for each its
# descriptor and the first tile that is still open to late events; the number of entities; each one's number of
# seen keys (I4 each, or '' if there are none at all); the size of each one's bundle as history has it (I4 each,
# 0: no events); those bundles, one behind the other. Of a layout that isn't in one, the entity has no events.
# Tiles before the first open one come from history. An open tile of live events comes from it as well if
# it covers them; else it stays, with all open tiles of the entity, and no id is remembered. Where history
# doesn't cover, what live events or a later history made stays. Other views' rings stay, unless they are to
# go; these views' rings of another layout go.
# Answers -1 if the fence holds another token, and 1 if none of the bundles was there, so that those with events
# are now; else a number a ring, layout by layout: 0 unchanged, 1 written, 2 left alone since its base is ahead,
# 3 has open tiles that history doesn't cover yet, 4 cleared, 5 isn't there. Behind those, a 4 for each ring that
# went because of its view or its layout.
WRITE_RINGS: Final = Script(
    RINGS_AND_BUNDLES
    + """
local keys, given = KEYS, ARGV
if redis.call('GET', keys[1]) ~= given[1] then
  return -1
end
local epoch, covers, remember, n_layouts = tonumber(given[2]) % 65536, given[3] == '1', given[4], tonumber(given[6])
local layouts, own, views, head, codes, expires, dropped = {}, {}, {}, 6, {}, false, 0
for at = 1, #given[5], 8 do
  views[sub(given[5], at, at + 7)] = true
end
for i = 1, n_layouts do
  local layout = described(given[head + 1])
  layout.first_live, head = tonumber(given[head + 2]), head + 2
  layouts[i], own[layout.id], views[sub(layout.id, 1, 8)] = layout, layout, true
  expires = expires or layout.expire_ms > 0
end
local n_entities, seen_counts, bundles = tonumber(given[head + 1]), given[head + 2], {}
do
  local each = {struct.unpack('<' .. string.rep('I4', n_entities), given[head + 3])}
  local data, at = given[head + 4], 1
  for entity = 1, n_entities do
    local to = at + each[entity]
    bundles[entity], at = sub(data, at, to - 1), to
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
  local slot_bytes, none, first_live = layout.slot_bytes, layout.none, layout.first_live
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

-- Lets an entity's bundle live for as long as these rings have to.
local function kept_alive(key, others, rings)
  local forever, expire_ms = false, 0
  for id in pairs(rings) do
    local layout = own[id]
    if layout then
      forever, expire_ms = forever or layout.expire_ms == 0, math.max(expire_ms, layout.expire_ms)
    end
  end
  lasting(key, others, forever, expire_ms)
end

-- Whether none of some entities' bundles was there; if so, those with events are now.
local function added(first, last)
  local rings, absent, n, n_absent = {}, {}, 0, 0
  for entity = first, last do
    if bundles[entity] == '' then
      n_absent = n_absent + 1
      absent[n_absent] = keys[entity + 1]
    else
      rings[n + 1], rings[n + 2] = keys[entity + 1], bundles[entity]
      n = n + 2
    end
  end
  if n_absent > 0 and redis.call('EXISTS', unpack(absent)) > 0 then
    return false
  end
  if n > 0 and redis.call('MSETNX', unpack(rings)) == 0 then
    return false
  end
  if expires then
    for at = 1, n, 2 do
      local _, begins = listed(rings[at + 1])
      kept_alive(rings[at], false, begins)
    end
  end
  return true
end

-- Writes a bundle: `after` has the rings of `views` that it has then, by id; other views' stay as they are.
local function put(key, bundle, after)
  local ids, begins, sizes = listed(bundle)
  local kept, parts, lengths, changed, others = {}, {}, {}, false, false
  local function keep(id, ring)
    kept[#kept + 1], parts[#parts + 1], lengths[id] = id, ring, #ring
  end
  for i = 1, #ids do
    local id = ids[i]
    local ring = sub(bundle, begins[id], begins[id] + sizes[id] - 1)
    if not views[sub(id, 1, 8)] then
      keep(id, ring)
      others = true
    elseif after[id] then
      keep(id, after[id])
      changed = changed or after[id] ~= ring
    else
      changed, dropped = true, own[id] and dropped or dropped + 1
    end
  end
  for i = 1, n_layouts do
    local id = layouts[i].id
    if after[id] and not sizes[id] then
      keep(id, after[id])
      changed = true
    end
  end
  if #kept == 0 then
    if bundle ~= '' then
      redis.call('UNLINK', key)
    end
    return
  elseif changed then
    local value = directory(kept, lengths) .. table.concat(parts)
    redis.call('SET', key, value, 'KEEPTTL')
  end
  kept_alive(key, others, after)
end

-- Brings an entity's beside what is there; whether live events' open tiles stayed.
local function replaced(entity)
  local key, given_bundle = keys[entity + 1], bundles[entity]
  local bundle = redis.call('GET', key) or ''
  local _, begins, sizes = listed(bundle)
  local _, given_begins, given_sizes = listed(given_bundle)
  local held, fresh, rings, ahead, after, any_live, any_busy = {}, {}, {}, {}, {}, false, false
  for i = 1, n_layouts do
    local layout = layouts[i]
    local id = layout.id
    local size, given_size = sizes[id] or 0, given_sizes[id]
    fresh[i] = given_size and sub(given_bundle, given_begins[id], given_begins[id] + given_size - 1) or layout.none
    held[i] = size > 0 and size % layout.slot_bytes == 0 and sub(bundle, begins[id], begins[id] + size - 1)
    if not held[i] or held[i] == fresh[i] then
      rings[i] = fresh[i]
    else
      local live, busy
      rings[i], live, busy, ahead[i] = composed(layout, held[i], fresh[i], false)
      any_live, any_busy = any_live or live, any_busy or busy
    end
  end
  for i = 1, n_layouts do
    local layout, code = layouts[i], 2
    if not ahead[i] then
      if any_busy then
        rings[i] = composed(layout, held[i] or layout.none, fresh[i], true)
      end
      if not given_sizes[layout.id] and rings[i] == layout.none then
        rings[i], code = nil, held[i] and 4 or 5
      else
        code = rings[i] == held[i] and 0 or 1
      end
    end
    after[layout.id], codes[(i - 1) * n_entities + entity] = rings[i], any_busy and 3 or code
  end
  put(key, bundle, after)
  return any_live or any_busy
end

local function remembered(first, last)
  for at = first, last do
    redis.call('SET', keys[at], '', 'NX', 'PX', remember)
  end
end

local seen = 2 + n_entities
if added(1, n_entities) then
  remembered(seen, #keys)
  return 1
end
for entity = 1, n_entities do
  local n_seen = seen_counts == '' and 0 or struct.unpack('<I4', seen_counts, 4 * entity - 3)
  local new = added(entity, entity)
  if new then
    local _, _, sizes = listed(bundles[entity])
    for i = 1, n_layouts do
      codes[(i - 1) * n_entities + entity] = sizes[layouts[i].id] and 1 or 5
    end
  end
  if new or not replaced(entity) then
    remembered(seen, seen + n_seen - 1)
  end
  seen = seen + n_seen
end
for _ = 1, dropped do
  codes[#codes + 1] = 4
end
return codes
"""
)
