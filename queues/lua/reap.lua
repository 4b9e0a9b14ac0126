-- reap: takes back grants whose lease ran out, by the server's clock. Makes no suspects (rule 14).
-- ARGV[1] most grants at a time  ARGV[2] 0, or so many ms: does nothing where somebody did this no longer ago
-- The tick guards against outages: after a gap over 3 s, or a clock that went back, leases move by the gap instead.
-- Returns {jobs made ready, leases that were moved, due delayed entries?, due deadlines?, due results?}.
local bad = begin()
if bad then return bad end
local last = call('HGET', META, 'tick')
local tick = tonumber(last or NOW)
if last and NOW >= tick and NOW - tick < tonumber(ARGV[2]) then return {0, 0, 0, 0, 0} end
call('HSET', META, 'tick', NOW)
local gap = NOW - tick
local moved, back = 0, 0
if gap > 3000 or gap < 0 then
  local all = call('ZRANGE', LEASE, 0, -1, 'WITHSCORES')
  moved = #all / 2
  for i = 1, #all, 2 do call('ZADD', LEASE, tonumber(all[i + 1]) + gap, all[i]) end
else
  for _, fence in ipairs(call('ZRANGEBYSCORE', LEASE, '-inf', NOW, 'LIMIT', 0, tonumber(ARGV[1]))) do
    local n = requeue(fence)
    back = back + n
  end
end
flush()
return {back, moved, call('ZCOUNT', DELAYED, '-inf', NOW) > 0 and 1 or 0, call('ZCOUNT', DEADLINE, '-inf', NOW) > 0 and 1 or 0,
  call('ZCOUNT', DONEQ, '-inf', NOW) > 0 and 1 or 0}
