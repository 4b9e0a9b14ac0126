-- lead: takes, keeps or gives up the right to decide for all hosts, and says who has it.
-- KEYS[1..4] as in fleet_lib
-- ARGV[1] candidate  ARGV[2] lease_ms, 0 to give up  ARGV[3] longest life of a host's report, ms
-- The epoch grows when somebody takes the right, also when he had it before and let it run out; never else.
-- Hosts whose time is over are forgotten here and nowhere else, after the tick has moved what an outage made old.
-- Returns {epoch of the candidate, 0 where he does not lead; who leads, '' for nobody; ms that are left to him}.
begin()
tick(tonumber(ARGV[3]))
for _, gone in ipairs(call('ZRANGEBYSCORE', ALIVE, '-inf', NOW)) do forget(gone) end
local holder = call('HGET', LEADER, 'holder') or ''
local ends = tonumber(call('HGET', LEADER, 'until') or 0)
local lease = tonumber(ARGV[2])
local led = holder ~= '' and ends > NOW
if lease == 0 then
  if holder == ARGV[1] then call('HSET', LEADER, 'holder', '', 'until', 0) end
  return {0, led and holder ~= ARGV[1] and holder or '', 0}
end
if led and holder ~= ARGV[1] then return {0, holder, ends - NOW} end
local epoch = tonumber(call('HGET', LEADER, 'epoch') or 0)
if not led then epoch = epoch + 1 end
call('HSET', LEADER, 'holder', ARGV[1], 'epoch', epoch, 'until', string.format('%.0f', NOW + lease))
return {epoch, ARGV[1], lease}
