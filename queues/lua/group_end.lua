-- group_end: an epoch of a group is over, for whatever reason; the next one may form.
-- KEYS[1] the group (see group.lua)
-- ARGV[1] the epoch that is over  ARGV[2] kind  ARGV[3] why  ARGV[4] rows that a forward may have from now on, 0 as before
-- Only the first who says so is heard: the epoch rises once. Returns the present epoch; 0 where there is no such group.
local G, call = KEYS[1], redis.call
local epoch = tonumber(call('HGET', G, 'epoch') or 0)
if epoch == 0 then return 0 end
if tonumber(ARGV[1]) ~= epoch then return epoch end
call('HSET', G, 'epoch', epoch + 1, 'kind', ARGV[2], 'why', ARGV[3])
call('HDEL', G, 'address')
if ARGV[4] ~= '0' then call('HSET', G, 'cap', ARGV[4]) end
return epoch + 1
