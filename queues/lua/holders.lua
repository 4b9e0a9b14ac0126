-- holders: which blobs of intermediate columns are still wanted. Writes nothing but the no-op of rule 5.
-- ARGV names of blobs (<job id>.<node>.<fence>.<column>), at most 256, in any order
-- Returns one character a name: 1 the live record of the job in the name lists it, and Redis has no copy (of what was
-- submitted it may), or for a minute the job is a dead letter that waits for one; 0 it does not: all who read it are
-- done, a restart dropped it, it was spilled, the job ended, or its commit never came.
-- A writer must not ask about blobs whose commit is on its way. A job that was redriven has another id: what its first
-- life made counts as not wanted, and its new life restarts where that is found lost.
local bad = begin()
if bad then return bad end
local ids, seen = {}, {}
for _, name in ipairs(ARGV) do
  local id = string.match(name, '^[%w~]+')
  if id and not seen[id] then
    seen[id] = true
    ids[#ids + 1] = id
  end
end
-- Neighbours share a bucket, and are read together.
table.sort(ids)
local recs, wanted = get_fields(ids, ''), {}
for i, id in ipairs(ids) do
  local refs, alive = '', recs[i]
  if alive then
    refs = parse(alive).refs
  else
    local packed = call('HGET', DEAD, id)
    local d = packed and cmsgpack.unpack(packed)
    if d and d[8] == '' and NOW - d[1] < 60000 then refs = parse(d[3]).refs end
  end
  for name, chunks, _, _, host in string.gmatch(refs, REF) do
    local needed = host ~= '' or alive and (chunks == '0' or is_input(name))
    if needed and string.match(name, '^[%w~]+') == id then wanted[name] = true end
  end
end
local flags = {}
for i, name in ipairs(ARGV) do flags[i] = wanted[name] and '1' or '0' end
return table.concat(flags)
