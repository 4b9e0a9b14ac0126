-- claim: takes up to a window of a node's ready jobs, in rank order, under one fence and lease.
-- KEYS[12] the worker's session
-- ARGV[1] operation  ARGV[2] fence  ARGV[3] worker incarnation  ARGV[4] pipeline number  ARGV[5] node
-- ARGV[6] max jobs  ARGV[7] max rows  ARGV[8] max inline bytes  ARGV[9] lease_ms
-- ARGV[10] last node that the worker runs, as for commit: what stands behind that one is what gates
-- Returns {fence or '', lease expiry ms, entries, records, ms until the next delayed entry or -1, entries left,
--   1 when gated, 2 when the node is paused}.
--   A record of a forking pipeline is {header and input payload, own entry, predecessors' outputs...}.
--   A replayed claim returns what is left of its grant. A suspect is always granted alone.
-- Refuses: TRRETIRED (rule 13), TRNOPIPE, TRARGS. Jobs past their deadline at the head (at most 256) end here.
local bad = begin()
if bad then return bad end
local SESS = KEYS[12]
local seq, fence = tonumber(ARGV[1]), ARGV[2]
local pid = tonumber(ARGV[4])
local max_jobs, max_rows, max_bytes, lease_ms = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local g = graph(pid)
if not g then return refuse('TRNOPIPE', ARGV[4]) end
local node = g.nodes[tonumber(ARGV[5])]
if not node then return refuse('TRARGS', 'node ' .. ARGV[5] .. ' of ' .. g.ref) end
local steps, last = chain(g, node, tonumber(ARGV[10]))
if not steps then return refuse('TRARGS', 'node ' .. ARGV[10] .. ' of ' .. g.ref .. ' is not fused to ' .. ARGV[5]) end

local function with_inputs(ids, recs)
  if g.linear then return recs end
  local own = get_fields(ids, '#' .. node.index)
  local out = {}
  for i = 1, #ids do out[i] = {recs[i], own[i]} end
  for _, p in ipairs(node.preds) do
    local v = p > 0 and get_fields(ids, '#' .. p) or nil
    for i = 1, #ids do out[i][#out[i] + 1] = v and v[i] or '' end
  end
  return out
end

local old, stale = replayed(SESS, seq)
if stale then return stale end
if old then
  local grant = read_grant(old)
  if not grant then return {'', 0, '', {}, -1, 0, 0} end
  local ids, recs, entries = {}, {}, {}
  for _, e in ipairs(held_entries(old, grant, grant.entries)) do
    if e.rec then ids[#ids + 1] = e.id; recs[#recs + 1] = e.rec; entries[#entries + 1] = e.packed end
  end
  call('ZADD', LEASE, 'XX', NOW + lease_ms, old)
  return {old, NOW + lease_ms, table.concat(entries), with_inputs(ids, recs), -1, 0, 0}
end
local RETIRED, PAUSED, paused = T .. 'retired:' .. ARGV[3], T .. 'paused', false
-- One look for both: neither is there as a rule.
if call('EXISTS', RETIRED, PAUSED) > 0 then
  if call('EXISTS', RETIRED) == 1 then return refuse('TRRETIRED', ARGV[3]) end
  for _, n in ipairs(steps) do paused = paused or call('HGET', PAUSED, n.key) == '1' end
end

check_types({GRANTS, LOAD, DONE}, {LEASE, DELAYED, DEADLINE, DONEQ})
local only_high, gated = false, false
for _, s in ipairs(last.succs) do
  local n = g.nodes[s]
  local l = call('HMGET', LOAD, n.key .. '.ready_rows', n.key .. '.ready_bytes')
  local r, b = tonumber(l[1] or 0), tonumber(l[2] or 0)
  if r >= n.max_rows or b >= n.max_bytes then only_high = true end
  if r >= n.max_rows * 1.25 or b >= n.max_bytes * 1.25 then gated = true end
end
promote_due(32)
flush()

local READY = T .. 'ready:' .. node.key
local ids, recs, entries = {}, {}, {}
local rows, inline, seen, expired, missing, ready_rows, ready_bytes = 0, 0, 0, 0, 0, 0, 0
local done = gated or paused
while not done do
  local peek = call('ZRANGE', READY, seen, seen + math.min(max_jobs, 64) - 1)
  if #peek == 0 then break end
  local v = get_fields(peek, '')
  local forks = not g.linear and get_fields(peek, '#' .. node.index)
  for i, id in ipairs(peek) do
    local rec = v[i]
    if not rec or (forks and not forks[i]) then
      missing = missing + 1
      seen = seen + 1
    else
      local _, deadline, r, b, _, _, _, _, _, _, gen, flags, suspect = unpackb(HEAD, rec)
      if forks then _, _, _, suspect, r, b = unpackb(FORK, forks[i]) end
      if deadline > 0 and deadline <= NOW then
        if expired >= 256 then done = true; break end
        expired = expired + 1
        -- It leaves its queues at once, so that the entries behind it move up.
        expire_job(g, id, parse(rec))
      else
        if only_high and band(flags, F_HIGH) == 0 then done = true; gated = true; break end
        if #ids > 0 and (rows + r > max_rows or inline + #rec > max_bytes or #ids >= max_jobs or suspect > 0) then
          done = true
          break
        end
        ids[#ids + 1] = id
        recs[#recs + 1] = rec
        entries[#entries + 1] = entry(id, gen)
        rows, inline = rows + r, inline + #rec
        ready_rows, ready_bytes = ready_rows + r, ready_bytes + b
        seen = seen + 1
        if suspect > 0 then done = true; break end
      end
    end
    if #ids >= max_jobs or rows >= max_rows or inline >= max_bytes then done = true; break end
  end
  if #peek < math.min(max_jobs, 64) then break end
end
if seen > 0 then call('ZREMRANGEBYRANK', READY, 0, seen - 1) end

local out = with_inputs(ids, recs)
local left = call('ZCARD', READY)
if missing > 0 and left == 0 then
  -- Somebody deleted records: what they counted is unknown, but what is left is nothing.
  flush()
  local l = call('HMGET', LOAD, node.key .. '.ready_rows', node.key .. '.ready_bytes')
  count(node.key .. '.ready_rows', ready_rows - tonumber(l[1] or 0))
  count(node.key .. '.ready_bytes', ready_bytes - tonumber(l[2] or 0))
end
if #ids > 0 then
  call('HSET', GRANTS, fence, string.format('%d.%d|%d|', pid, node.index, rows) .. table.concat(entries))
  call('ZADD', LEASE, NOW + lease_ms, fence)
  local l = call('HMGET', LOAD, node.key .. '.ready_rows', node.key .. '.ready_bytes')
  local r, b = tonumber(l[1] or 0), tonumber(l[2] or 0)
  local low_rows, low_bytes = node.max_rows / 2, node.max_bytes / 2
  local opened = (r >= low_rows and r - ready_rows < low_rows) or (b >= low_bytes and b - ready_bytes < low_bytes)
  count(node.key .. '.ready_rows', -ready_rows)
  count(node.key .. '.ready_bytes', -ready_bytes)
  count(node.key .. '.held_rows', rows)
  if opened then for _, p in ipairs(node.preds) do if p > 0 then wake(g.nodes[p].key) end end end
  remember(SESS, seq, fence)
end
if left > 0 and (#ids > 0 or expired > 0) then wake(node.key) end
flush()
local next_due = call('ZRANGE', DELAYED, 0, 0, 'WITHSCORES')[2]
local wait = next_due and math.max(0, math.ceil(tonumber(next_due) - NOW)) or -1
return {#ids > 0 and fence or '', NOW + lease_ms, table.concat(entries), out, wait, left, paused and 2 or gated and 1 or 0}
