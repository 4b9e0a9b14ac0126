-- aged: asks for what lay in a host's shared memory for long, and whose jobs wait still.
-- ARGV[1] host  ARGV[2..] names of blobs (<job id>.<node>.<fence>.<column>), at most 256
-- Returns how many of them it asked for. Those of jobs that are held are left: who holds them reads them.
local bad = begin()
if bad then return bad end
local host, asked = ARGV[1], 0
for i = 2, #ARGV do
  local id = string.match(ARGV[i], '^[%w~]+')
  local rec = id and get_fields({id}, '')[1]
  local h = rec and parse(rec)
  local g = h and graph(h.pid)
  local readers = 0
  for name, _, _, consumers, at in string.gmatch(g and h.refs or '', REF) do
    if name == ARGV[i] and at == host then readers = tonumber(consumers) end
  end
  for _, node in ipairs(readers > 0 and open_nodes(g, h.mask) or {}) do
    if waits(node, id) and ask_host(host, id, node.index, readers, NOW) then asked = asked + 1 end
  end
end
return asked
