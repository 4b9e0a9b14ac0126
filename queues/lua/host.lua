-- host: an agent says that its host lives, or takes its leave, and hears what the host is to run.
-- KEYS[1..4] as in fleet_lib  KEYS[5] desired states
-- ARGV[1] host  ARGV[2] incarnation of the agent  ARGV[3] longest life of a report, ms  ARGV[4] report, '' to leave
-- Returns {1, desired state or ''}; {0, owner} with nothing written while another agent of that name is alive.
begin()
call('HLEN', KEYS[5])
tick(tonumber(ARGV[3]))
local owner = call('HGET', OWNERS, ARGV[1])
if owner and owner ~= ARGV[2] then
  local ends = call('ZSCORE', ALIVE, ARGV[1])
  if ends and tonumber(ends) > NOW then return {0, owner} end
  if ARGV[4] == '' then return {0, owner} end
end
if ARGV[4] == '' then
  forget(ARGV[1])
else
  call('ZADD', ALIVE, NOW + tonumber(ARGV[3]), ARGV[1])
  call('HSET', HOSTS, ARGV[1], ARGV[4])
  call('HSET', OWNERS, ARGV[1], ARGV[2])
end
return {1, call('HGET', KEYS[5], ARGV[1]) or ''}
