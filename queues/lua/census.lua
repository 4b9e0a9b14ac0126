-- census: which nodes jobs stand at, in one moment.
-- ARGV[1] place of the first delayed entry to look at  ARGV[2] how many of them
-- Returns {delayed entries in all, node, ready, held, delayed, the next node, ...} for nodes with anything. Ready and
-- held entries are counted when ARGV[1] is 0 only, so that a caller who goes on adds up.
local bad = begin()
if bad then return bad end
check_types({GRAPH, GRANTS}, {DELAYED})
local found, order = {}, {}
local function add(g, index, place, n)
  local node = n > 0 and g and g.nodes[index]
  if not node then return end
  if not found[node.key] then
    found[node.key] = {0, 0, 0}
    order[#order + 1] = node.key
  end
  found[node.key][place] = found[node.key][place] + n
end
local first = tonumber(ARGV[1])
if first == 0 then
  for _, pid in ipairs(call('HKEYS', GRAPH)) do
    local g = graph(tonumber(pid))
    for i, node in ipairs(g.nodes) do
      local n = redis.pcall('ZCARD', T .. 'ready:' .. node.key)
      if type(n) == 'number' then add(g, i, 1, n) end
    end
  end
  for _, fence in ipairs(call('HKEYS', GRANTS)) do
    local grant = read_grant(fence)
    local _, n = string.gsub(grant.entries, ENTRY, '')
    add(graph(grant.pid), grant.node, 2, n)
  end
end
local ids, indexes = {}, {}
for _, member in ipairs(call('ZRANGE', DELAYED, first, first + tonumber(ARGV[2]) - 1)) do
  local id, index = string.match(member, '^([%w~]+)|(%d+)$')
  if id then
    ids[#ids + 1] = id
    indexes[#ids] = tonumber(index)
  end
end
local recs = get_fields(ids, '')
for i = 1, #ids do
  if recs[i] then add(graph(parse(recs[i]).pid), indexes[i], 3, 1) end
end
local out = {call('ZCARD', DELAYED)}
for _, key in ipairs(order) do
  out[#out + 1] = key
  for place = 1, 3 do out[#out + 1] = found[key][place] end
end
return out
