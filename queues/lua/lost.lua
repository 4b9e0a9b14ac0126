-- lost: bytes behind these jobs' refs are gone: restart them in a new generation (rule 1).
-- KEYS[12] the worker's session
-- ARGV[1] operation  ARGV[2] fence  ARGV[3] entries  ARGV[4] error (msgpack), for a job that nothing can restart
-- A linear job restarts from its last self-contained form, a forking one from its input. A job whose own input is
-- what is missing, or that restarted 100 times, fails for good.
-- Returns one letter a job: g restarted, f failed for good, s stale.
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
check_types({LOAD, DONE, DEAD}, {LEASE, DELAYED, DEADLINE, DONEQ})
if g then check_ready(g.nodes) end

-- Intermediate blobs of the generation that ends are freed; the input's refs are kept.
local function keep_inputs(refs)
  local kept = {}
  for name, chunks, bytes, consumers in string.gmatch(refs, REF) do
    if is_input(name) then kept[#kept + 1] = name .. ':' .. chunks .. ':' .. bytes .. ':' .. consumers .. ','
    else doomed[#doomed + 1] = T .. 'blob:' .. name end
  end
  return table.concat(kept)
end

local function restart_linear(e)
  local h = e.h
  if band(h.flags, F_CHECKPOINT) == 0 then return false end
  local key, field = extra(e.id, '0')
  local c = parse(call('HGET', key, field))
  call('HDEL', key, field)
  h.flags = h.flags - F_CHECKPOINT
  h.refs = keep_inputs(h.refs)
  h.mask, h.rows, h.bytes, h.payload = c.mask, c.rows, c.bytes, c.payload
  h.attempts, h.strikes, h.releases, h.suspect = 0, 0, 0, 0
  h.gen = h.gen + 1
  put_fields({e.id}, {build(h)})
  for _, n in ipairs(open_nodes(g, h.mask)) do make_ready(n, e.id, h.rank, h.rows, h.bytes) end
  return true
end

local function restart_fork(e)
  local h = e.h
  if h.mask == 0 then return false end
  leave_queues(g, e.id, h)
  for i = 1, #g.nodes do
    local key, field = extra(e.id, i)
    call('HDEL', key, field)
  end
  h.refs = keep_inputs(h.refs)
  h.mask = 0
  h.gen = h.gen + 1
  put_fields({e.id}, {build(h)})
  for _, n in ipairs(open_nodes(g, 0)) do
    put_fork(e.id, n, {attempts = 0, strikes = 0, releases = 0, suspect = 0, rows = h.rows, bytes = h.bytes, payload = ''})
    make_ready(n, e.id, h.rank, h.rows, h.bytes)
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
      if g.linear then restarted = restart_linear(e) else restarted = restart_fork(e) end
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
