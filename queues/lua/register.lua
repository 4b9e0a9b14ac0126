-- register: gives a pipeline version its number, records it, and may make it the current one. Lives in the control slot.
-- KEYS[1] current versions  KEYS[2] records  KEYS[3] numbers
-- ARGV[1] name  ARGV[2] name@version  ARGV[3] record (JSON)  ARGV[4] '1' to make it current
-- Returns {number, 1 when new}.
local number = redis.call('HGET', KEYS[3], ARGV[2])
local fresh = number and 0 or 1
if not number then
  number = redis.call('HLEN', KEYS[3]) + 1
  redis.call('HSET', KEYS[3], ARGV[2], number)
end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
if ARGV[4] == '1' then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
return {tonumber(number), fresh}
