-- commit: records one node's outputs and releases the successors, or ends the job.
-- KEYS[12] the worker's session
-- ARGV[1] operation  ARGV[2] fence  ARGV[3] pipeline number  ARGV[4] node that was claimed
-- ARGV[5] last node: the same, or where the worker ran the nodes up to this one as well; each must follow the one
--   before and nothing else. All of them are then done, and what the last one left stands for all: the others have no
--   entry of their own, by which a restart (lost.lua) knows that they can only run again together.
-- ARGV[6] entries  ARGV[7] '' or rows of each job's output (4 bytes each, ffffffff to leave them)
-- ARGV[8] '' or refs texts of the new blobs, each with ';'  ARGV[9..] payloads, one a job
-- Returns one letter a job: k committed; s stale fence, generation or record (nothing written for it); d past its
-- deadline (ended so); b its blobs are incomplete (it stays in the grant). Never refused for capacity (rule 4);
-- refused, with nothing written: TRNOPIPE, TRARGS.
local bad = begin()
if bad then return bad end
local SESS = KEYS[12]
local seq, fence = tonumber(ARGV[1]), ARGV[2]
local old, stale = replayed(SESS, seq)
if old or stale then return old or stale end
local grant = read_grant(fence)
if grant and (grant.pid ~= tonumber(ARGV[3]) or grant.node ~= tonumber(ARGV[4])) then grant = nil end
local g = graph(tonumber(ARGV[3]))
if not g then return refuse('TRNOPIPE', ARGV[3]) end
local node = g.nodes[tonumber(ARGV[4])]
if not node then return refuse('TRARGS', 'node ' .. ARGV[4] .. ' of ' .. g.ref) end
local steps, last = chain(g, node, tonumber(ARGV[5]))
if not steps then return refuse('TRARGS', 'node ' .. ARGV[5] .. ' of ' .. g.ref .. ' is not fused to ' .. ARGV[4]) end
local list, whole = held_entries(fence, grant, ARGV[6])
local new_refs = {}
for r in string.gmatch(ARGV[8], '([^;]*);') do new_refs[#new_refs + 1] = r end
local fits = #ARGV == 8 + #list and (#ARGV[7] == 0 or #ARGV[7] == 4 * #list) and (#ARGV[8] == 0 or #new_refs == #list)
if not fits then
  return refuse('TRARGS', #list .. ' entries do not match what came with them')
end
check_types({LOAD, DONE}, {LEASE, DEADLINE, DELAYED, DONEQ})
for _, i in ipairs(last.succs) do check_ready({g.nodes[i]}) end
local incomplete = {}
for i, e in ipairs(list) do
  local added = new_refs[i] or ''
  if e.rec and #added > 0 then
    if #e.h.refs + #added > 65535 then return refuse('TRARGS', 'refs of job ' .. e.id .. ' take over 65535 bytes') end
    incomplete[i] = not blobs_complete(added)
  end
end

local status, taken, taken_rows, committed = {}, {}, 0, 0
local ids, values = {}, {}
local bits = 0
for _, n in ipairs(steps) do bits = bor(bits, n.bit) end

-- Drops the refs whose consumers are all done, and adds the new ones. Returns the text, and whether bytes stand in it
-- that only this record's past can bring back.
local function next_refs(refs, added, mask)
  local kept, derived = {}, false
  for name, chunks, bytes, consumers, host in string.gmatch(refs .. added, REF) do
    local c = tonumber(consumers)
    if c ~= 0 and band(mask, c) == c and not is_input(name) then
      doomed[#doomed + 1] = T .. 'blob:' .. name
    else
      kept[#kept + 1] = ref_text(name, chunks, bytes, consumers, host)
      if not is_input(name) then derived = true end
    end
  end
  return table.concat(kept), derived
end

-- A linear record is overwritten in place; its last self-contained form is kept beside it as long as it needs one.
-- Behind a node whose output may be lost with its worker, so is the form before it, as '#p': what that node read stays.
local function advance_linear(e, rows, payload, added)
  local h = e.h
  if band(h.flags, F_CHECKPOINT) > 0 then
    local key, field = extra(e.id, 'p')
    local before = node.preds[1]
    if last.volatile and #added > 0 then call('HSET', key, field, e.rec)
    elseif before > 0 and g.nodes[before].volatile then call('HDEL', key, field) end
  end
  local mask, derived = bor(h.mask, bits), false
  if #h.refs > 0 or #added > 0 then
    local refs
    refs, derived = next_refs(h.refs, added, mask)
    if derived and band(h.flags, F_CHECKPOINT) == 0 then
      local key, field = extra(e.id, '0')
      call('HSET', key, field, e.rec)
      h.flags = bor(h.flags, F_CHECKPOINT)
    end
    h.refs = refs
  end
  if not derived and band(h.flags, F_CHECKPOINT) > 0 then drop_checkpoint(e.id, h) end
  h.mask, h.rows, h.payload = mask, rows, payload
  h.bytes = #h.refs > 0 and math.min(#payload + refs_bytes(h.refs), MOST) or #payload
  h.attempts, h.strikes, h.releases, h.suspect = 0, 0, 0, 0
  ids[#ids + 1] = e.id
  values[#values + 1] = build(h)
  for _, i in ipairs(last.succs) do make_ready(g.nodes[i], e.id, h.rank, rows, h.bytes) end
end

local function advance_fork(e, rows, payload, added)
  local h = e.h
  h.mask = bor(h.mask, bits)
  if #h.refs > 0 or #added > 0 then h.refs = next_refs(h.refs, added, h.mask) end
  if last ~= node then
    local key, field = extra(e.id, node.index)
    call('HDEL', key, field)
  end
  put_fork(e.id, last, {attempts = 0, strikes = 0, releases = 0, suspect = 0, rows = rows, bytes = #payload, payload = payload})
  put_fields({e.id}, {build(h)})
  for _, i in ipairs(last.succs) do
    local n = g.nodes[i]
    if band(h.mask, n.needs) == n.needs then
      local bytes = #payload
      put_fork(e.id, n, {attempts = 0, strikes = 0, releases = 0, suspect = 0, rows = rows, bytes = bytes, payload = ''})
      make_ready(n, e.id, h.rank, rows, bytes)
    end
  end
end

-- The result is the terminal nodes' payloads, one behind the other in the order of their numbers.
local function complete(e, rows, payload, added)
  local h = e.h
  if not g.linear then
    local parts = {}
    for i, n in ipairs(g.nodes) do
      if #n.succs == 0 then parts[#parts + 1] = n == last and payload or fork_state(e.id, n).payload end
    end
    payload = table.concat(parts)
  end
  local refs = (#h.refs > 0 or #added > 0) and doom_refs(h.refs .. added, true) or ''
  finish(g, e.id, h, 'k', last.index, rows, refs, payload)
end

for i, e in ipairs(list) do
  local added = new_refs[i] or ''
  if not e.rec or band(e.h.mask, node.bit) > 0 then
    status[i] = 's'
    if e.mine then taken[e.packed] = true end
  elseif incomplete[i] then
    status[i] = 'b'
    whole = false
  else
    local h = e.h
    taken[e.packed] = true
    local had = state_of(g, e.id, h, node).rows
    local rows = #ARGV[7] > 0 and unpackb('<I4', ARGV[7], 4 * i - 3) or MOST
    if rows == MOST then rows = had end
    taken_rows = taken_rows + had
    if #added > 0 then persist_refs(added) end
    if h.deadline > 0 and h.deadline <= NOW then
      status[i] = 'd'
      doom_refs(added, false)
      expire_job(g, e.id, h)
    else
      status[i] = 'k'
      committed = committed + 1
      if bor(h.mask, bits) == g.all then complete(e, rows, ARGV[8 + i], added)
      elseif g.linear then advance_linear(e, rows, ARGV[8 + i], added)
      else advance_fork(e, rows, ARGV[8 + i], added) end
    end
  end
end
if grant then shrink_grant(fence, grant, node, taken, whole, taken_rows) end
if #ids > 0 then put_fields(ids, values) end
for _, n in ipairs(steps) do count(n.key .. '.committed', committed) end
flush()
local result = table.concat(status)
remember(SESS, seq, result)
return result
