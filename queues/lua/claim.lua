-- claim: takes up to a window of ready jobs at one of a worker's entrances, in rank order, under one fence and lease.
-- An entrance is a node at which the worker claims, of whichever pipeline: fused stages are entered at each of them, and
-- a stage in the pipeline's own graph and in that of its runs. It is the one whose first job is best in rank, so that
-- none starves; one that is gated or paused is passed over.
-- KEYS[12] the worker's session
-- ARGV[1] operation  ARGV[2] fence  ARGV[3] worker incarnation  ARGV[4] max inline bytes  ARGV[5] lease_ms
-- ARGV[6] '' or a rank: only jobs that are better, those of a lower one, are given
-- ARGV[7] the worker's host, '' where it reads no shared memory  ARGV[8] ms that others' hosts have to find a worker
-- ARGV[9..] per entrance: pipeline number, node, last node that the worker runs (as for commit: what stands behind that
--   one is what gates), the node's key, '' where the graph is to tell, max jobs, max rows
-- Returns {fence or '', lease expiry ms, entries, records, ms until the next delayed entry or -1, entries left,
--   1 when gated, 2 when the node is paused, which entrance, from 0, and how many jobs were passed over, whose bytes lie
--   in another host's memory}; without a grant, what holds of the entrance that came first.
--   A record of a forking pipeline is {header and input payload, own entry, predecessors' outputs...}.
--   A replayed claim returns what is left of its grant. A suspect is always granted alone.
-- A job that needs bytes of another host's shared memory is that host's to claim, and passed over: at most 128 of them. Its
-- workers get the wake, and the host is asked to copy the bytes to Redis when the time is over and the job waits still.
-- A claim that found enough asks for nothing, but for what waited a second longer than what it got. Where nobody there
-- answers, the job is claimed like any other, found lost, and restarted.
-- Refuses: TRRETIRED (rule 13), TRNOPIPE, TRARGS. Jobs past their deadline at the head (at most 256) end here.
local bad = begin()
if bad then return bad end
local SESS = KEYS[12]
local seq, fence = tonumber(ARGV[1]), ARGV[2]
local max_bytes, lease_ms, better = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local host, patience_ms = ARGV[7], tonumber(ARGV[8])
local MOST_SKIPPED = 128

-- What the graph says of an entrance; of most, only whether anything is ready is ever asked.
local function look_up(e)
  if e.g then return end
  e.g = graph(e.pid)
  if not e.g then return refuse('TRNOPIPE', e.pid) end
  local node = e.g.nodes[e.node]
  if not node then return refuse('TRARGS', 'node ' .. e.node .. ' of ' .. e.g.ref) end
  if e.key ~= '' and e.key ~= node.key then return refuse('TRARGS', e.key .. ' is not ' .. node.key) end
  e.steps, e.last = chain(e.g, node, e.last)
  if not e.steps then return refuse('TRARGS', 'node ' .. e.to .. ' of ' .. e.g.ref .. ' is not fused to ' .. e.node) end
  e.at, e.key, e.bits = node, node.key, 0
  for _, n in ipairs(e.steps) do e.bits = bor(e.bits, n.bit) end
end
local entrances = {}
for i = 9, #ARGV, 6 do
  local e = {number = (i - 9) / 6, pid = tonumber(ARGV[i]), node = tonumber(ARGV[i + 1]), to = ARGV[i + 2],
    last = tonumber(ARGV[i + 2]), key = ARGV[i + 3], max_jobs = tonumber(ARGV[i + 4]), max_rows = tonumber(ARGV[i + 5])}
  if i == 9 or e.key == '' then
    local wrong = look_up(e)
    if wrong then return wrong end
  end
  entrances[#entrances + 1] = e
end

local function with_inputs(g, node, ids, recs)
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
  if not grant then return {'', 0, '', {}, -1, 0, 0, 0, 0} end
  local mine
  for _, e in ipairs(entrances) do
    if e.pid == grant.pid and e.node == grant.node then mine = e end
  end
  if not mine then return refuse('TRARGS', 'the grant ' .. old .. ' is of none of these nodes') end
  local wrong = look_up(mine)
  if wrong then return wrong end
  local ids, recs, entries = {}, {}, {}
  for _, e in ipairs(held_entries(old, grant, grant.entries)) do
    if e.rec then ids[#ids + 1] = e.id; recs[#recs + 1] = e.rec; entries[#entries + 1] = e.packed end
  end
  call('ZADD', LEASE, 'XX', NOW + lease_ms, old)
  local found = with_inputs(mine.g, mine.at, ids, recs)
  return {old, NOW + lease_ms, table.concat(entries), found, -1, 0, 0, mine.number, 0}
end
local RETIRED, PAUSED, some_paused = T .. 'retired:' .. ARGV[3], T .. 'paused', false
-- One look for both: neither is there as a rule.
if call('EXISTS', RETIRED, PAUSED) > 0 then
  if call('EXISTS', RETIRED) == 1 then return refuse('TRRETIRED', ARGV[3]) end
  some_paused = true
end

check_types({GRANTS, LOAD, DONE}, {LEASE, DELAYED, DEADLINE, DONEQ})
promote_due(32)
flush()
-- Who has anything ready, best rank first; of equals, who came first. All checks are made before anything is written.
local order = {}
for _, e in ipairs(entrances) do
  -- A foreign key in the place of one must not stop the others.
  local head = (e.number == 0 and call or redis.pcall)('ZRANGE', T .. 'ready:' .. e.key, 0, 0, 'WITHSCORES')
  e.rank = tonumber(head[2])
  if e.rank and not (better and e.rank >= better) then
    local wrong = look_up(e)
    if wrong then return wrong end
    order[#order + 1] = e
  end
end
if #order > 1 then
  table.sort(order, function(a, b) return a.rank < b.rank or a.rank == b.rank and a.number < b.number end)
end

-- Jobs past their deadline that were met, at whichever entrance.
local expired = 0

-- Other hosts that answer and in whose memory alone there is what these nodes read of a job; nil where there are none.
local answering = {}
local function elsewhere(refs, bits)
  local found = nil
  for _, _, _, consumers, at in string.gmatch(refs, REF) do
    if at ~= '' and at ~= host and band(tonumber(consumers), bits) > 0 then
      if answering[at] == nil then answering[at] = answers(at) end
      if answering[at] then
        found = found or {}
        found[at] = true
      end
    end
  end
  return found
end

-- Asks for what was passed over, for twice the jobs and rows that the claim had room for, since their own host's workers
-- take the first of them next. `behind` is the rank of the worst job
-- that a full claim got: what is a second better is asked for all the same, or it might never have its turn.
-- Returns whether there was more than that.
local function ask_for(e, skipped, jobs, rows, behind)
  local hosts, more = {}, false
  for _, s in ipairs(skipped) do
    for at in pairs(s.hosts) do hosts[at] = true end
    if not behind or s.rank + 1000 < behind then
      if jobs <= 0 or rows <= 0 then more = true; break end
      local news = false
      for at in pairs(s.hosts) do news = ask_host(at, s.id, e.at.index, e.bits, NOW + patience_ms) or news end
      if news then jobs, rows = jobs - 1, rows - s.rows end
    end
  end
  -- The token that woke this worker may have been meant for one of theirs.
  for at in pairs(hosts) do wake(e.key .. '@' .. at) end
  return more
end

-- Takes what one entrance has: {ids, records, entries, rows, gated, paused, left}.
local function take(e)
  local g, node, max_jobs, max_rows = e.g, e.at, e.max_jobs, e.max_rows
  local paused, only_high, gated = false, false, false
  if some_paused then
    for _, n in ipairs(e.steps) do paused = paused or call('HGET', PAUSED, n.key) == '1' end
  end
  for _, s in ipairs(e.last.succs) do
    local n = g.nodes[s]
    local l = call('HMGET', LOAD, n.key .. '.ready_rows', n.key .. '.ready_bytes')
    local r, b = tonumber(l[1] or 0), tonumber(l[2] or 0)
    if r >= n.max_rows or b >= n.max_bytes then only_high = true end
    if r >= n.max_rows * 1.25 or b >= n.max_bytes * 1.25 then gated = true end
  end
  local READY = T .. 'ready:' .. node.key
  local ids, recs, entries, skipped, absent = {}, {}, {}, {}, {}
  local rows, inline, seen, missing, ready_rows, ready_bytes, worst = 0, 0, 0, 0, 0, 0, 0
  local done, full, leads = gated or paused, false, {}
  while not done do
    local peek = call('ZRANGE', READY, seen, seen + math.min(max_jobs, 64) - 1)
    if #peek == 0 then break end
    local v = get_fields(peek, '')
    local forks = not g.linear and get_fields(peek, '#' .. node.index)
    for i, id in ipairs(peek) do
      local rec = v[i]
      if not rec or (forks and not forks[i]) then
        missing = missing + 1
        absent[missing] = id
        seen = seen + 1
      else
        local rank, deadline, r, b, _, _, _, _, _, _, gen, flags, suspect, reflen = unpackb(HEAD, rec)
        local class = math.floor(suspect / 2)
        suspect = suspect % 2
        if forks then _, _, _, suspect, r, b = unpackb(FORK, forks[i]) end
        if deadline > 0 and deadline <= NOW then
          if expired >= 256 then done = true; break end
          expired = expired + 1
          -- It leaves its queues at once, so that the entries behind it move up.
          expire_job(g, id, parse(rec))
        else
          if better and rank >= better then done = true; break end
          if only_high and band(flags, F_HIGH) == 0 then done = true; gated = true; break end
          if #ids > 0 and (rows + r > max_rows or inline + #rec > max_bytes or #ids >= max_jobs or suspect > 0) then
            done, full = true, true
            break
          end
          local hosts = reflen > 0 and elsewhere(sub(rec, 43, 42 + reflen), e.bits)
          if hosts then
            skipped[#skipped + 1] = {id = id, rank = rank, rows = r, hosts = hosts}
            seen = seen + 1
            if #skipped >= MOST_SKIPPED then done = true; break end
          else
            ids[#ids + 1] = id
            recs[#recs + 1] = rec
            entries[#entries + 1] = entry(id, gen)
            rows, inline = rows + r, inline + #rec
            ready_rows, ready_bytes = ready_rows + r, ready_bytes + b
            seen, worst = seen + 1, rank
            if class > 0 and node.needs == 0 then leads[class] = math.max(leads[class] or rank, rank) end
            if suspect > 0 then done, full = true, true; break end
          end
        end
      end
      if #ids >= max_jobs or rows >= max_rows or inline >= max_bytes then done, full = true, true; break end
    end
    if #peek < math.min(max_jobs, 64) then break end
  end
  if #skipped > 0 then
    if #ids > 0 then slices('ZREM', READY, ids) end
    if missing > 0 then slices('ZREM', READY, absent) end
  elseif seen > 0 then
    call('ZREMRANGEBYRANK', READY, 0, seen - 1)
  end
  local left, more = call('ZCARD', READY), false
  if #skipped > 0 then
    left = math.max(0, left - #skipped)
    more = ask_for(e, skipped, 2 * math.max(1, max_jobs - #ids), 2 * math.max(1, max_rows - rows), full and worst)
  end
  if missing > 0 and left == 0 and #skipped == 0 then
    -- Somebody deleted records: what they counted is unknown, but what is left is nothing.
    flush()
    local l = call('HMGET', LOAD, node.key .. '.ready_rows', node.key .. '.ready_bytes')
    count(node.key .. '.ready_rows', ready_rows - tonumber(l[1] or 0))
    count(node.key .. '.ready_bytes', ready_bytes - tonumber(l[2] or 0))
  end
  return {ids = ids, recs = recs, entries = entries, rows = rows, ready_rows = ready_rows, ready_bytes = ready_bytes,
    left = left, gated = gated, paused = paused, skipped = #skipped, more = more,
    leads = leads}
end

-- How it stands at the first entrance in rank, unless another one gives something; with nothing ready, at none.
local first, got = nil, nil
for _, e in ipairs(order) do
  local taken = take(e)
  taken.e = e
  first = first or taken
  if #taken.ids > 0 then
    got = taken
    break
  end
end
if got then
  local node = got.e.at
  local entries = table.concat(got.entries)
  call('HSET', GRANTS, fence, string.format('%d.%d|%d|', got.e.pid, node.index, got.rows) .. entries)
  call('ZADD', LEASE, NOW + lease_ms, fence)
  local l = call('HMGET', LOAD, node.key .. '.ready_rows', node.key .. '.ready_bytes')
  local r, b = tonumber(l[1] or 0), tonumber(l[2] or 0)
  local low_rows, low_bytes = node.max_rows / 2, node.max_bytes / 2
  local opened = (r >= low_rows and r - got.ready_rows < low_rows) or (b >= low_bytes and b - got.ready_bytes < low_bytes)
  count(node.key .. '.ready_rows', -got.ready_rows)
  count(node.key .. '.ready_bytes', -got.ready_bytes)
  count(node.key .. '.held_rows', got.rows)
  if next(got.leads) then fair_served(got.e.g, got.leads, got.rows, got.left) end
  if opened then for _, p in ipairs(node.preds) do if p > 0 then wake(got.e.g.nodes[p].key) end end end
  remember(SESS, seq, fence)
end
-- The token that woke this worker may have been another entrance's: whoever else waits there must not miss it.
if got or expired > 0 then
  for _, e in ipairs(order) do
    if call('EXISTS', T .. 'ready:' .. e.key) == 1 then wake(e.key) end
  end
elseif first and first.more then
  -- Other workers that wait here may ask for what this one has no room for.
  wake(first.e.key)
end
local out = got and with_inputs(got.e.g, got.e.at, got.ids, got.recs) or {}
flush()
local next_due = call('ZRANGE', DELAYED, 0, 0, 'WITHSCORES')[2]
local wait = next_due and math.max(0, math.ceil(tonumber(next_due) - NOW)) or -1
local how = got or first or {left = 0, entries = {}, e = {number = 0}, skipped = 0}
return {got and fence or '', NOW + lease_ms, table.concat(how.entries), out, wait, how.left,
  how.paused and 2 or how.gated and 1 or 0, how.e.number, how.skipped}
