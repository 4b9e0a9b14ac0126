-- sweep: forgets results whose keep time is over, with their keys and blobs.
-- ARGV[1] most at a time
-- Returns how many.
local bad = begin()
if bad then return bad end
local due = call('ZRANGEBYSCORE', DONEQ, '-inf', NOW, 'LIMIT', 0, tonumber(ARGV[1]))
if #due == 0 then return 0 end
local recs = call('HMGET', DONE, unpack(due))
local keyed = {}
for i, id in ipairs(due) do
  local rec = recs[i]
  if rec then
    local _, flags, _, _, _, _, bytes, _, reflen = unpackb(TERMINAL, rec)
    local at = 20
    if band(flags, F_KEYED) > 0 then keyed[#keyed + 1] = sub(rec, 20, 35); at = 36 end
    if reflen > 0 then doom_refs(sub(rec, at, at + reflen - 1), false) end
    count('results.bytes', -bytes)
  elseif sub(id, 1, 5) == 'dead:' then
    call('HDEL', DEAD, sub(id, 6))
  end
end
slices('HDEL', DONE, due)
slices('ZREM', DONEQ, due)
if #keyed > 0 then slices('HDEL', KEYED, keyed) end
flush()
return #due
