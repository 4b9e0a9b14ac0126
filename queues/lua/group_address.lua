-- group_address: where the ranks of an epoch meet, written by rank 0.
-- KEYS[1] the group (see group.lua)
-- ARGV[1] epoch  ARGV[2] address
-- Returns 1; 0 with nothing written where that epoch is over, or has an address.
local G, call = KEYS[1], redis.call
if call('HGET', G, 'epoch') ~= ARGV[1] then return 0 end
return call('HSETNX', G, 'address', ARGV[2])
