-- decree: the leader writes what hosts are to run, which slots are set aside, and why.
-- KEYS[1..4] as in fleet_lib  KEYS[5] desired states  KEYS[6] slots that are set aside  KEYS[7] reasons (STRING)
-- ARGV[1] holder  ARGV[2] his epoch  ARGV[3] reasons (JSON), '' to leave them  ARGV[4] number of desired states
-- ARGV[5..] host and its desired state (JSON), '' to take it away; then slot and what is known of it, likewise
-- Returns 1; 0 with nothing written for who does not lead, or no longer, or not in this epoch: he may have been paused.
begin()
local known = call('HMGET', LEADER, 'holder', 'epoch', 'until')
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] or tonumber(known[3] or 0) <= NOW then return 0 end
call('HLEN', KEYS[5])
call('HLEN', KEYS[6])
if ARGV[3] ~= '' then call('SET', KEYS[7], ARGV[3]) end
local first_of_slots = 5 + 2 * tonumber(ARGV[4])
for i = 5, #ARGV - 1, 2 do
  local key = i < first_of_slots and KEYS[5] or KEYS[6]
  if ARGV[i + 1] == '' then call('HDEL', key, ARGV[i]) else call('HSET', key, ARGV[i], ARGV[i + 1]) end
end
return 1
