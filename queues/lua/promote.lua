-- promote: delayed entries whose time has come become ready.
-- ARGV[1] most at a time
-- Returns {promoted, ms until the next or -1}.
local bad = begin()
if bad then return bad end
local n = promote_due(tonumber(ARGV[1]))
flush()
local next_due = call('ZRANGE', DELAYED, 0, 0, 'WITHSCORES')[2]
return {n, next_due and math.max(0, math.ceil(tonumber(next_due) - NOW)) or -1}
