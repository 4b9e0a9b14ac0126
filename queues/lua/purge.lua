-- purge: cancels jobs that wait, ready or delayed, at the given nodes; held ones are left alone.
-- ARGV[1] the nodes, as pipeline number:mask, each with ','  ARGV[2..] ids, at most 256
-- Returns how many jobs ended. An id that is held, ended, unknown or elsewhere is passed over, so it is safe beside
-- claims and safe to repeat. A job of a fork that waits here and is held in another branch ends too: that branch's
-- commit finds no record and answers stale. Predecessors wake: their gate may have opened (rule 16).
local bad = begin()
if bad then return bad end
if #ARGV < 2 then return 0 end
check_types({LOAD, DONE}, {DELAYED, DEADLINE, DONEQ})
local masks = {}
for pid, mask in string.gmatch(ARGV[1], '(%d+):(%d+),') do masks[tonumber(pid)] = tonumber(mask) end
local ids = {unpack(ARGV, 2)}
local recs = get_fields(ids, '')
local seen, ended, opened = {}, 0, {}
for i, id in ipairs(ids) do
  local h = recs[i] and not seen[id] and parse(recs[i])
  local mask = h and masks[h.pid]
  local g = mask and graph(h.pid)
  local found = nil
  for _, node in ipairs(g and open_nodes(g, h.mask) or {}) do
    if not found and band(mask, node.bit) > 0 and waits(node, id) then found = node end
  end
  if found then
    seen[id] = true
    ended = ended + 1
    for _, p in ipairs(found.preds) do if p > 0 then opened[g.nodes[p].key] = true end end
    leave_queues(g, id, h)
    doom_refs(h.refs, false)
    finish(g, id, h, 'c', 0, h.rows, '', '')
  end
end
flush()
for key in pairs(opened) do wake(key) end
return ended
