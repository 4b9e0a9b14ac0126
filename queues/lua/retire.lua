-- retire: a worker is dead: its later claims are refused and its grants return at once (rule 13).
-- ARGV[1] incarnation  ARGV[2] entries that it was computing (they become suspects)  ARGV[3] max strikes
-- ARGV[4] error (msgpack), for a job that killed its worker alone too often
-- One suspect alone in its batch earns a strike; several rerun alone first. Safe to repeat.
-- Returns {jobs made ready, jobs buried}.
local bad = begin()
if bad then return bad end
call('SET', T .. 'retired:' .. ARGV[1], 1, 'PX', 86400000)
local started, n = {}, 0
for id, g in string.gmatch(ARGV[2], ENTRY) do started[id .. g] = true; n = n + 1 end
local back, buried = 0, 0
for _, fence in ipairs(call('HKEYS', GRANTS)) do
  if sub(fence, 1, #ARGV[1] + 1) == ARGV[1] .. '-' then
    local b, d = requeue(fence, started, n == 1, tonumber(ARGV[3]), ARGV[4])
    back, buried = back + b, buried + d
    -- The next grant may hold another branch of the same job: it must find this one in the queues.
    flush()
  end
end
return {back, buried}
