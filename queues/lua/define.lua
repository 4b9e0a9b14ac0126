-- define: makes a pipeline version known to this lane, or updates its marks.
-- ARGV[1] pipeline number  ARGV[2] packed graph, as lib's graph() reads it
-- Returns 1.
local bad = begin()
if bad then return bad end
call('HSET', GRAPH, ARGV[1], ARGV[2])
return 1
