-- fleet_lib: what the scripts of the fleet share; it is prepended to each of them. They live in the control slot.
-- KEYS[1] leader (HASH: holder, epoch, until, tick)  KEYS[2] expiry of hosts  KEYS[3] their reports  KEYS[4] their owners
local LEADER, ALIVE, HOSTS, OWNERS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local call = redis.call
local NOW
do
  local t = call('TIME')
  NOW = t[1] * 1000 + math.floor(t[2] / 1000)
end

-- Allowed out of memory, so it comes first (rule 5); and a key of another type stops a script before its first write.
local function begin()
  call('HDEL', LEADER, '')
  call('ZCARD', ALIVE)
  call('HLEN', HOSTS)
  call('HLEN', OWNERS)
end

-- Agents and coordinators leave a tick. A gap over 3 s, or a clock that went back, means that nobody could say that he
-- lives: what would have run out meanwhile moves by the gap (rule 14). Nobody lives longer than a report from now on.
local function tick(ttl_ms)
  local gap = NOW - tonumber(call('HGET', LEADER, 'tick') or NOW)
  if gap > 3000 or gap < 0 then
    local ends = call('HGET', LEADER, 'until')
    if ends then call('HSET', LEADER, 'until', string.format('%.0f', ends + gap)) end
    local all = call('ZRANGE', ALIVE, 0, -1, 'WITHSCORES')
    for i = 1, #all, 2 do call('ZADD', ALIVE, math.min(all[i + 1] + gap, NOW + ttl_ms), all[i]) end
  end
  call('HSET', LEADER, 'tick', string.format('%.0f', NOW))
end

local function forget(host)
  call('ZREM', ALIVE, host)
  call('HDEL', HOSTS, host)
  call('HDEL', OWNERS, host)
end
