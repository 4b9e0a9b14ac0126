-- init: opens a lane, or says what it was opened with.
-- ARGV[1] number of lanes of the namespace
-- Returns {schema, lanes, 1 when this call opened it}; refuses nothing: the client compares.
call('HDEL', META, '') -- allowed out of memory (rule 5): workers that start help to drain
local fresh = call('HSETNX', META, 'schema', '1')
if fresh == 1 then call('HSET', META, 'lanes', ARGV[1]) end
local v = call('HMGET', META, 'schema', 'lanes')
return {v[1], v[2], fresh}
