-- pause: stops or resumes the claims of a pipeline's nodes; what is held is finished, and submits go on.
-- KEYS[12] paused nodes
-- ARGV[1] pipeline name  ARGV[2] its version, '' for all, later ones included  ARGV[3] stage, '' for all
-- ARGV[4] '1' to pause, '0' to resume
-- Returns the nodes that match. A resume wakes their workers. Idempotent.
-- The HASH holds node -> 1 while it is paused; for versions to come, name -> 1, and name/stage -> 1 or 0 where that
-- differs. It is absent while nothing is paused, so that a claim finds out with one EXISTS.
local bad = begin()
if bad then return bad end
local PAUSED, name, version, stage, on = KEYS[12], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
check_types({GRAPH, PAUSED}, {})
local matched = {}
for _, pid in ipairs(call('HKEYS', GRAPH)) do
  local g = graph(tonumber(pid))
  -- The graph of a version's runs has the version's ref and a suffix.
  if version == '' and string.match(g.ref, '^[^@]*') == name or string.match(g.ref, '^[^+]*') == name .. '@' .. version then
    for _, node in ipairs(g.nodes) do
      if stage == '' or node.key == g.ref .. '/' .. stage then matched[#matched + 1] = node.key end
    end
  end
end
if version == '' then
  local rule = stage == '' and name or name .. '/' .. stage
  if stage == '' then
    for _, field in ipairs(call('HKEYS', PAUSED)) do
      if sub(field, 1, #name + 1) == name .. '/' then call('HDEL', PAUSED, field) end
    end
  end
  -- What the rule of the whole pipeline says already needs no rule of the stage.
  local whole = stage ~= '' and call('HGET', PAUSED, name) or '0'
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
