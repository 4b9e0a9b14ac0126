-- group: one rank of a group says that it lives, and hears how the group stands.
-- KEYS[1] the group (HASH: size, of, epoch, address, kind, why, cap, draining, tick; per rank who:R, until:R, at:R)
-- ARGV[1] size  ARGV[2] rank  ARGV[3] who asks  ARGV[4] ms that he is taken to live, 0 to leave
-- ARGV[5] the epoch for which he is ready, with no process of an older one  ARGV[6] ms that the record outlives all
-- ARGV[7] '1' where the group is to drain  ARGV[8] what it computes, the same for all ranks that live
-- Whoever finds that a rank which was ready for this epoch lives no more ends the epoch: it rises by one.
-- After a gap in which nobody could tell that he lives (the server was away), lives move by the gap, once: who is gone
-- has his time from the first who asks again.
-- Returns {-1, size of the group} with nothing written, or {0, who has the rank}, or {-2, what it computes}, with at
-- most such a gap; else
-- {1, epoch, ranks that live and are ready for it, address, how the epoch before ended, why, cap, draining}.
local G, call = KEYS[1], redis.call
local t = call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local size, rank = call('HGET', G, 'size'), ARGV[2]
if size and size ~= ARGV[1] then return {-1, size} end
local who, ends = call('HGET', G, 'who:' .. rank), tonumber(call('HGET', G, 'until:' .. rank) or 0)
local gap = now - tonumber(call('HGET', G, 'tick') or now)
if gap < 1500 and gap >= 0 then gap = 0 end
-- Also of who is refused, or lives would move by each of his waits.
call('HSET', G, 'tick', string.format('%.0f', now))
if gap ~= 0 then
  for r = 0, tonumber(ARGV[1]) - 1 do
    local until_ = call('HGET', G, 'until:' .. r)
    if until_ then call('HSET', G, 'until:' .. r, string.format('%.0f', until_ + gap)) end
  end
end
if who and who ~= ARGV[3] and ends + gap > now then return {0, who} end
local of = call('HGET', G, 'of')
if of and of ~= ARGV[8] then
  for r = 0, tonumber(ARGV[1]) - 1 do
    if tostring(r) ~= rank and tonumber(call('HGET', G, 'until:' .. r) or 0) > now then return {-2, of} end
  end
  call('HDEL', G, 'cap')
end
call('HSET', G, 'size', ARGV[1], 'of', ARGV[8])
local epoch = tonumber(call('HGET', G, 'epoch') or 1)
local function finish(kind, why)
  epoch = epoch + 1
  call('HSET', G, 'kind', kind, 'why', why)
  call('HDEL', G, 'address')
end
-- Another process than the one that was ready for this epoch.
if who and who ~= ARGV[3] and tonumber(call('HGET', G, 'at:' .. rank) or 0) == epoch then
  finish('vanished', 'rank ' .. rank .. ' was started anew')
end
if ARGV[4] == '0' then
  call('HDEL', G, 'who:' .. rank, 'until:' .. rank, 'at:' .. rank)
else
  call('HSET', G, 'who:' .. rank, ARGV[3], 'until:' .. rank, string.format('%.0f', now + ARGV[4]), 'at:' .. rank, ARGV[5])
end
if ARGV[7] == '1' then call('HSET', G, 'draining', '1') end
local ready, living = 0, 0
for r = 0, tonumber(ARGV[1]) - 1 do
  local until_, at = tonumber(call('HGET', G, 'until:' .. r) or 0), tonumber(call('HGET', G, 'at:' .. r) or 0)
  if until_ > now then
    living = living + 1
    if at == epoch then ready = ready + 1 end
  elseif at == epoch then
    finish('vanished', 'nothing was heard of rank ' .. r .. ' and its supervisor or host')
    ready = 0
  end
end
-- A group that drained and is gone may be started again.
if living == 0 then call('HDEL', G, 'draining') end
call('HSET', G, 'epoch', epoch)
call('PEXPIRE', G, ARGV[6])
local found = call('HMGET', G, 'address', 'kind', 'why', 'cap', 'draining')
return {1, epoch, ready, found[1] or '', found[2] or '', found[3] or '', tonumber(found[4] or 0), found[5] and 1 or 0}
