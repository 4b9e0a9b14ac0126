-- recount: compares the lane's load counters with the records, and mends them. For repair and tests: it reads the
-- whole lane while the server waits.
-- ARGV[1] '1' to mend, '0' to look only
-- Returns triples: field, counted, true value, for each counter that was wrong.
local bad = begin()
if bad then return bad end
local truth = {}
local function add(field, n) truth[field] = (truth[field] or 0) + n end
for _, pid in ipairs(call('HKEYS', GRAPH)) do
  local g = graph(tonumber(pid))
  for _, node in ipairs(g.nodes) do
    add(node.key .. '.ready_rows', 0)
    add(node.key .. '.ready_bytes', 0)
    add(node.key .. '.held_rows', 0)
    local at = 0
    while true do
      local ids = call('ZRANGE', T .. 'ready:' .. node.key, at, at + 999)
      if #ids == 0 then break end
      local recs = get_fields(ids, '')
      for i, id in ipairs(ids) do
        if recs[i] then
          local h = parse(recs[i])
          local s = state_of(g, id, h, node)
          if s then
            add(node.key .. '.ready_rows', s.rows)
            add(node.key .. '.ready_bytes', s.bytes)
          end
        end
      end
      at = at + 1000
    end
  end
end
for _, fence in ipairs(call('HKEYS', GRANTS)) do
  local grant = read_grant(fence)
  add(graph(grant.pid).nodes[grant.node].key .. '.held_rows', grant.rows)
end
local results = call('HVALS', DONE)
add('results.bytes', 0)
for _, rec in ipairs(results) do
  local _, _, _, _, _, _, bytes = unpackb(TERMINAL, rec)
  add('results.bytes', bytes)
end
local wrong = {}
for field, n in pairs(truth) do
  local counted = tonumber(call('HGET', LOAD, field) or 0)
  if counted ~= n then
    wrong[#wrong + 1] = field
    wrong[#wrong + 1] = counted
    wrong[#wrong + 1] = n
    if ARGV[1] == '1' then call('HSET', LOAD, field, n) end
  end
end
return wrong
