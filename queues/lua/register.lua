-- register: gives a pipeline version its number, records it, and may make it the current one. Lives in the control slot.
-- KEYS[1] current versions  KEYS[2] records  KEYS[3] numbers  KEYS[4] history of the current versions of this name
-- KEYS[5] where versions were registered from
-- ARGV[1] name  ARGV[2] name@version  ARGV[3] record (JSON), '' to leave what is known
-- ARGV[4] '1' to make it current, 'f' only if the name has no current version, '0' not
-- ARGV[5] host:path, '' for unknown  ARGV[6] how many entries of history are kept
-- Returns {number, 1 when new, the version that is current now}; number 0, with nothing written, for a version that
-- came without a record and is not known. History is a LIST of 'ms name@version', the latest first.
-- A no-op that is allowed out of memory comes first (rule 5): workers that start help to drain.
redis.call('HDEL', KEYS[1], '')
local number = redis.call('HGET', KEYS[3], ARGV[2])
local fresh = number and 0 or 1
if fresh == 1 and ARGV[3] == '' then return {0, 0, ''} end
local current = redis.call('HGET', KEYS[1], ARGV[1])
redis.call('LLEN', KEYS[4])
if not number then
  number = redis.call('HLEN', KEYS[3]) + 1
  redis.call('HSET', KEYS[3], ARGV[2], number)
end
if ARGV[3] ~= '' then redis.call('HSET', KEYS[2], ARGV[2], ARGV[3]) end
if ARGV[5] ~= '' then redis.call('HSET', KEYS[5], ARGV[2], ARGV[5]) end
if (ARGV[4] == '1' and current ~= ARGV[2]) or (ARGV[4] == 'f' and not current) then
  -- A namespace from before there was a history: what was current then can be gone back to as well.
  if current and redis.call('LLEN', KEYS[4]) == 0 then redis.call('LPUSH', KEYS[4], '0 ' .. current) end
  local t = redis.call('TIME')
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
  redis.call('LPUSH', KEYS[4], string.format('%.0f ', t[1] * 1000 + math.floor(t[2] / 1000)) .. ARGV[2])
  redis.call('LTRIM', KEYS[4], 0, tonumber(ARGV[6]) - 1)
  current = ARGV[2]
end
return {tonumber(number), fresh, current or ''}
