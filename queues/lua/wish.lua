-- wish: an operator asks for something that the leader heeds from then on. Passes out of memory (rule 5).
-- KEYS[1] wishes
-- ARGV[1] what for  ARGV[2] how much, '' to take the wish back  ARGV[3] ms that it lasts, 0 for ever
-- Returns how many wishes there are. A wish that lasts for a time is kept as 'value|ms of the server's clock'.
redis.call('HDEL', KEYS[1], '')
local value = ARGV[2]
if value ~= '' and ARGV[3] ~= '0' then
  local t = redis.call('TIME')
  value = value .. string.format('|%.0f', t[1] * 1000 + math.floor(t[2] / 1000) + tonumber(ARGV[3]))
end
if value == '' then redis.call('HDEL', KEYS[1], ARGV[1]) else redis.call('HSET', KEYS[1], ARGV[1], value) end
return redis.call('HLEN', KEYS[1])
