-- fail: a stage raised on these jobs: back to wait, or to the dead letters.
-- KEYS[12] the worker's session
-- ARGV[1] operation  ARGV[2] fence  ARGV[3] pipeline number  ARGV[4] node  ARGV[5] entries  ARGV[6] max attempts
-- ARGV[7..] per job: delay_ms before the next attempt, error (msgpack)
-- Returns one letter a job: r will be retried, f failed for good, s stale (nothing written for it).
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
local node, max_attempts = g.nodes[tonumber(ARGV[4])], tonumber(ARGV[6])
local list, whole = held_entries(fence, grant, ARGV[5])
check_types({LOAD, DONE, DEAD}, {LEASE, DELAYED, DEADLINE, DONEQ})
if node then check_ready({node}) end
local status, taken, taken_rows, charged = {}, {}, 0, 0
for i, e in ipairs(list) do
  if e.mine then taken[e.packed] = true end
  status[i] = 's'
  if e.rec and band(e.h.mask, node.bit) == 0 then
    local h = e.h
    local s = state_of(g, e.id, h, node)
    taken_rows = taken_rows + s.rows
    charged = charged + 1
    s.attempts, s.suspect = math.min(s.attempts + 1, 255), 0
    add_history(e.id, h, ARGV[7 + 2 * i - 1])
    if s.attempts >= max_attempts then
      status[i] = 'f'
      h.attempts = s.attempts
      leave_queues(g, e.id, h)
      bury(g, e.id, h, node.index, ARGV[7 + 2 * i - 1])
    else
      status[i] = 'r'
      put_fields({e.id}, {build(h)})
      if not g.linear then put_fork(e.id, node, s) end
      local delay = tonumber(ARGV[7 + 2 * i - 2])
      if delay > 0 then
        call('ZADD', DELAYED, NOW + delay, e.id .. '|' .. node.index)
        -- What waits so long does not belong in a host's memory.
        if delay >= 5000 then ask_hosts(h.refs, e.id, node.index, node.bit) end
      else make_ready(node, e.id, h.rank, s.rows, s.bytes) end
    end
  end
end
if grant then shrink_grant(fence, grant, node, taken, whole, taken_rows) end
count(node.key .. '.failed', charged)
flush()
local result = table.concat(status)
remember(SESS, seq, result)
return result
