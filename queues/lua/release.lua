-- release: gives entries back unharmed (shutdown, a window that is too large), free of charge.
-- KEYS[12] the worker's session
-- ARGV[1] operation  ARGV[2] fence  ARGV[3] entries
-- Returns one letter a job: r ready again with its old rank, s stale.
local bad = begin()
if bad then return bad end
local SESS = KEYS[12]
local seq, fence = tonumber(ARGV[1]), ARGV[2]
local old, stale = replayed(SESS, seq)
if old or stale then return old or stale end
local grant = read_grant(fence)
local g = grant and graph(grant.pid)
local node = g and g.nodes[grant.node]
local list, whole = held_entries(fence, grant, ARGV[3])
check_types({LOAD}, {LEASE})
if node then check_ready({node}) end
local status, taken, taken_rows = {}, {}, 0
for i, e in ipairs(list) do
  if e.mine then taken[e.packed] = true end
  status[i] = 's'
  if e.rec and band(e.h.mask, node.bit) == 0 then
    status[i] = 'r'
    local s = state_of(g, e.id, e.h, node)
    s.releases = math.min(s.releases + 1, 255)
    taken_rows = taken_rows + s.rows
    put_back(g, e.id, e.h, node, s)
  end
end
if grant then shrink_grant(fence, grant, node, taken, whole, taken_rows) end
flush()
local result = table.concat(status)
remember(SESS, seq, result)
return result
