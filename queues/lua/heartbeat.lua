-- heartbeat: a worker is alive until its time is over. Lives in the control slot; passes out of memory (rule 5).
-- KEYS[1] expiry of workers  KEYS[2] their reports
-- ARGV[1] worker  ARGV[2] ttl_ms, 0 to leave  ARGV[3] report (JSON)
-- Returns how many workers are alive.
redis.call('ZREM', KEYS[1], '')
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)) do
  redis.call('ZREM', KEYS[1], gone)
  redis.call('HDEL', KEYS[2], gone)
end
if ARGV[2] == '0' then
  redis.call('ZREM', KEYS[1], ARGV[1])
  redis.call('HDEL', KEYS[2], ARGV[1])
else
  redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
end
return redis.call('ZCARD', KEYS[1])
