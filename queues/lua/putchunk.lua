-- putchunk: one chunk of a blob, for a worker whose plain write was refused out of memory (rule 5).
-- KEYS[12] blob  ARGV[1] chunk number  ARGV[2] bytes  ARGV[3] ttl_ms
-- Returns 1.
local bad = begin()
if bad then return bad end
call('HSET', KEYS[12], ARGV[1], ARGV[2])
call('PEXPIRE', KEYS[12], ARGV[3])
return 1
