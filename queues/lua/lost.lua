-- lost: bytes behind these jobs' refs are gone: restart them in a new generation (rule 1), from the nearest node whose
-- input survives.
-- KEYS[12] the worker's session
-- ARGV[1] operation  ARGV[2] fence  ARGV[3] entries  ARGV[4] error (msgpack), for a job that nothing can restart
-- ARGV[5] '' or per job the mask of the nodes that made what is gone (4 bytes each), 0 where that is unknown: all
-- A linear job restarts from the form before a node whose output may be lost with its worker, if that is the last that
-- was done and all that is gone was made behind that form; else from its last self-contained form. A forking one reruns
-- the makers and every node behind them, and with a node those that were committed together with it (commit.lua): a
-- stage need not give the same twice, so nothing that was computed from the lost bytes may meet what is computed anew.
-- Other branches keep their outputs and their places; what is held there is stale, and ready again. If a maker's own
-- input is gone too, its worker finds out and calls again: so the restart walks back.
-- A job none of whose nodes is done (its own input is missing), or that restarted 100 times, fails for good.
-- Returns one letter a job: g restarted, f failed for good, s stale. Refused, with nothing written: TRARGS.
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
if #ARGV[5] > 0 and #ARGV[5] ~= 4 * #list then
  return refuse('TRARGS', #list .. ' entries do not match ' .. #ARGV[5] .. ' bytes of masks')
end
check_types({LOAD, DONE, DEAD}, {LEASE, DELAYED, DEADLINE, DONEQ})
if g then check_ready(g.nodes) end

-- Frees the blobs that these nodes made (nil: all nodes); the input's refs are kept.
local function drop_refs(refs, nodes)
  local kept = {}
  for name, chunks, bytes, consumers, host in string.gmatch(refs, REF) do
    local maker = tonumber(string.match(name, '^[%w~]+%.(%d+)%.'))
    if maker ~= 0 and (not nodes or nodes[maker]) then doomed[#doomed + 1] = T .. 'blob:' .. name
    else kept[#kept + 1] = ref_text(name, chunks, bytes, consumers, host) end
  end
  return table.concat(kept)
end

-- The form before the last node, where that one was kept and nothing made before it is gone; else the last
-- self-contained one. (A node need not read what the one before the form made: it would run again and again.)
local function restart_linear(e, makers)
  local h = e.h
  if band(h.flags, F_CHECKPOINT) == 0 then return false end
  makers = band(makers, h.mask)
  local key, field = extra(e.id, 'p')
  local rec = makers > 0 and call('HGET', key, field)
  local c = rec and parse(rec)
  local again
  if c and band(makers, c.mask) == 0 then
    call('HDEL', key, field)
    again = {}
    for i, n in ipairs(g.nodes) do again[i] = band(c.mask, n.bit) == 0 end
  else
    c = parse(call('HGET', extra(e.id, '0')))
    drop_checkpoint(e.id, h)
  end
  h.refs = drop_refs(h.refs, again)
  h.mask, h.rows, h.bytes, h.payload = c.mask, c.rows, c.bytes, c.payload
  h.attempts, h.strikes, h.releases, h.suspect = 0, 0, 0, 0
  h.gen = h.gen + 1
  put_fields({e.id}, {build(h)})
  for _, n in ipairs(open_nodes(g, h.mask)) do make_ready(n, e.id, h.rank, h.rows, h.bytes) end
  return true
end

local function with_descendants(mask)
  local found, todo = {}, {}
  local function add(i)
    if not found[i] then found[i] = true; todo[#todo + 1] = i end
  end
  for i, n in ipairs(g.nodes) do if band(mask, n.bit) > 0 then add(i) end end
  while #todo > 0 do
    for _, i in ipairs(g.nodes[table.remove(todo)].succs) do add(i) end
  end
  return found
end

-- What was done as one is undone as one: a done node without an entry was committed with its successor.
local function with_fused(id, h, mask)
  for i, n in ipairs(g.nodes) do
    local at = n
    while band(mask, n.bit) > 0 and #at.preds == 1 and at.preds[1] > 0 do
      at = g.nodes[at.preds[1]]
      if band(h.mask, at.bit) == 0 or fork_state(id, at) then break end
      mask = bor(mask, at.bit)
    end
  end
  return mask
end

local function restart_fork(e, makers)
  local h = e.h
  if h.mask == 0 then return false end
  makers = band(makers, h.mask)
  local cleared = with_descendants(with_fused(e.id, h, makers > 0 and makers or h.mask))
  for _, n in ipairs(open_nodes(g, h.mask)) do
    if cleared[n.index] then leave_queue(g, e.id, h, n)
    elseif not waits(n, e.id) then
      local s = fork_state(e.id, n)
      make_ready(n, e.id, h.rank, s.rows, s.bytes)
    end
  end
  for i, n in ipairs(g.nodes) do
    if cleared[i] then
      local key, field = extra(e.id, i)
      call('HDEL', key, field)
      if band(h.mask, n.bit) > 0 then h.mask = h.mask - n.bit end
    end
  end
  h.refs = drop_refs(h.refs, cleared)
  h.gen = h.gen + 1
  put_fields({e.id}, {build(h)})
  for _, n in ipairs(open_nodes(g, h.mask)) do
    if cleared[n.index] then open_fork(g, e.id, h, n) end
  end
  return true
end

local status, taken, taken_rows = {}, {}, 0
for i, e in ipairs(list) do
  if e.mine then taken[e.packed] = true end
  status[i] = 's'
  if e.rec and band(e.h.mask, node.bit) == 0 then
    local s = state_of(g, e.id, e.h, node)
    taken_rows = taken_rows + s.rows
    local restarted = false
    if e.h.gen < MAX_GEN then
      local makers = #ARGV[5] > 0 and unpackb('<I4', ARGV[5], 4 * i - 3) or 0
      if g.linear then restarted = restart_linear(e, makers) else restarted = restart_fork(e, makers) end
    end
    if restarted then
      status[i] = 'g'
    else
      status[i] = 'f'
      e.h.attempts = s.attempts
      leave_queues(g, e.id, e.h)
      add_history(e.id, e.h, ARGV[4])
      bury(g, e.id, e.h, node.index, ARGV[4])
    end
  end
end
if grant then shrink_grant(fence, grant, node, taken, whole, taken_rows) end
flush()
local result = table.concat(status)
remember(SESS, seq, result)
return result
