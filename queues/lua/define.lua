-- define: makes a pipeline version known to this lane, or updates its marks.
-- KEYS[12] paused nodes
-- ARGV[1] pipeline number  ARGV[2] packed graph, as lib's graph() reads it
-- Returns 1. The nodes of a version that is new here are paused where a pause of all versions says so.
local bad = begin()
if bad then return bad end
local PAUSED = KEYS[12]
check_types({GRAPH, PAUSED}, {})
local fresh = call('HSET', GRAPH, ARGV[1], ARGV[2])
if fresh == 1 and call('EXISTS', PAUSED) == 1 then
  local g = graph(tonumber(ARGV[1]))
  local name = string.match(g.ref, '^[^@]*')
  for _, node in ipairs(g.nodes) do
    local path = name .. sub(node.key, #g.ref + 1)
    -- A part of a stage that is cut (`shards`) follows the stage.
    local rules = call('HMGET', PAUSED, path, string.match(path, '^(.-)%.') or path, name)
    if (rules[1] or rules[2] or rules[3]) == '1' then call('HSET', PAUSED, node.key, 1) end
  end
end
return 1
