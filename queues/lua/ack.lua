-- ack: the client has these results; those that are kept only until delivered go.
-- ARGV ids
-- Returns how many went.
local bad = begin()
if bad then return bad end
if #ARGV == 0 then return 0 end
local recs = call('HMGET', DONE, unpack(ARGV))
local out, seen = {}, {}
for i, id in ipairs(ARGV) do
  local rec = recs[i]
  if rec and not seen[id] then
    seen[id] = true
    local _, flags, _, _, _, _, bytes, _, reflen = unpackb(TERMINAL, rec)
    if band(flags, F_UNTIL_ACK) > 0 and band(flags, F_KEYED) == 0 then
      out[#out + 1] = id
      count('results.bytes', -bytes)
      if reflen > 0 then doom_refs(sub(rec, 20, 19 + reflen), false) end
    end
  end
end
if #out > 0 then slices('HDEL', DONE, out); slices('ZREM', DONEQ, out) end
flush()
return #out
