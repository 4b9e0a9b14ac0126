-- pause: stops or resumes the claims of a pipeline's nodes; what is held is finished, and submits go on.
-- KEYS[12] paused nodes
-- ARGV[1] pipeline name  ARGV[2] its version, '' for all, later ones included
-- ARGV[3] stage, '' for all; one that is cut (`shards`) stands for its parts, stage.0 and so on
-- ARGV[4] '1' to pause, '0' to resume
-- Returns the nodes that match. A resume wakes their workers. Idempotent.
-- The HASH holds node -> 1 while it is paused; for versions to come, name -> 1, and name/stage -> 1 or 0 where that
-- differs from the rule of the pipeline, or of the stage whose part it is. It is absent while nothing is paused, so that
-- a claim finds out with one EXISTS.
local bad = begin()
if bad then return bad end
local PAUSED, name, version, stage, on = KEYS[12], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
check_types({GRAPH, PAUSED}, {})
local matched = {}
local function means(path)
  return stage == '' or path == stage or sub(path, 1, #stage + 1) == stage .. '.'
end
for _, pid in ipairs(call('HKEYS', GRAPH)) do
  local g = graph(tonumber(pid))
  -- The graph of a version's runs has the version's ref and a suffix.
  if version == '' and string.match(g.ref, '^[^@]*') == name or string.match(g.ref, '^[^+]*') == name .. '@' .. version then
    for _, node in ipairs(g.nodes) do
      if means(sub(node.key, #g.ref + 2)) then matched[#matched + 1] = node.key end
    end
  end
end
if version == '' then
  local rule = stage == '' and name or name .. '/' .. stage
  for _, field in ipairs(call('HKEYS', PAUSED)) do
    if sub(field, 1, #name + 1) == name .. '/' and means(sub(field, #name + 2)) then call('HDEL', PAUSED, field) end
  end
  -- What the rule of a whole says already needs no rule of its part.
  local of = string.match(stage, '^(.-)%.')
  local whole = of and call('HGET', PAUSED, name .. '/' .. of) or stage ~= '' and call('HGET', PAUSED, name) or '0'
  if whole == on then call('HDEL', PAUSED, rule) else call('HSET', PAUSED, rule, on) end
end
for _, key in ipairs(matched) do
  if on == '1' then
    call('HSET', PAUSED, key, 1)
  else
    call('HDEL', PAUSED, key)
    wake(key)
  end
end
return matched
