-- lib: what every transition shares; it is prepended to each script.
-- KEYS[1..11] are the lane's fixed keys, in this order; a script may declare more behind them.
-- Keys of jobs, ready sets, wake lists, replies and blobs are derived from records of the same lane, under the same tag.
-- There is no rollback in Redis: every script checks first and writes last.
local META, GRAPH, GRANTS, LEASE, LOAD = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local DELAYED, DEADLINE, DONE, DONEQ, KEYED, DEAD = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local T = string.sub(META, 1, -5)
local call, sub, byte, char, pack, unpackb = redis.call, string.sub, string.byte, string.char, struct.pack, struct.unpack
local band, bor = bit.band, bit.bor
local NOW
do
  local t = call('TIME')
  NOW = t[1] * 1000 + math.floor(t[2] / 1000)
end

-- The job's header: rank, deadline_ms, rows, bytes, done-mask, keep_s, pipeline number, attempts, strikes, releases,
-- generation, flags, suspect, length of the refs text. Refs and payload follow. 42 bytes. The byte of `suspect` also holds
-- 2 * (priority + 1) of a job that has a tenant.
local HEAD = '<ddI4I4I4I4I2BBBBBBI2'
local F_KEYED, F_HISTORY, F_SUBSCRIBED, F_CHECKPOINT, F_UNTIL_ACK, F_HIGH, F_TABLE, F_KEEP = 1, 2, 4, 8, 16, 32, 64, 128
-- A node's entry of a job in a pipeline that forks: attempts, strikes, releases, suspect, rows, bytes. Payload follows.
local FORK = '<BBBBI4I4'
local MAX_GEN = 100
-- Byte counts stand in 4 bytes; more counts as this, in the record and in the load alike.
local MOST = 4294967295
local BATON_STEP = 64

local function refuse(word, text) return redis.error_reply(word .. ' ' .. text) end

-- Writes that are allowed out of memory come first (rule 5); a lane of another schema is refused.
local function begin(oom_refuses)
  if not oom_refuses then call('HDEL', META, '') end
  local schema = call('HGET', META, 'schema')
  if schema ~= '1' then return refuse('TRSCHEMA', schema or 'none') end
end
-- A key of another type must stop a script before its first write: there is no rollback.
local function check_types(hashes, zsets)
  for _, key in ipairs(hashes) do call('HLEN', key) end
  for _, key in ipairs(zsets) do call('ZCARD', key) end
end
local function check_ready(nodes)
  for _, n in ipairs(nodes) do call('ZCARD', T .. 'ready:' .. n.key) end
end
local function sound(node) return type(redis.pcall('ZCARD', T .. 'ready:' .. node.key)) == 'number' end

local function slices(command, key, list)
  for i = 1, #list, 4000 do call(command, key, unpack(list, i, math.min(i + 3999, #list))) end
end

-- Operation replay (rule 11): a ring of 16 results per session; a lower number than the slot's is refused.
local function replayed(sess, seq)
  local v = call('HGET', sess, seq % 16)
  if not v then return nil end
  local cut = string.find(v, '|', 1, true)
  local old = tonumber(sub(v, 1, cut - 1))
  if old == seq then return sub(v, cut + 1) end
  if old > seq then return nil, refuse('TRSTALEOP', 'operation ' .. seq .. ' is older than ' .. old) end
end
local function remember(sess, seq, result)
  call('HSET', sess, seq % 16, string.format('%d|', seq) .. result)
  call('PEXPIRE', sess, 900000)
end

-- Job fields: an id is 16 characters (and ~n when redriven); bucket = the first 14, field = the rest (+ '#' + extra).
local function by_bucket(ids, visit)
  local n, i = #ids, 1
  while i <= n do
    local bucket, j = sub(ids[i], 1, 14), i
    while j < n and j - i < 1900 and sub(ids[j + 1], 1, 14) == bucket do j = j + 1 end
    visit(T .. 'j:' .. bucket, i, j)
    i = j + 1
  end
end
local function get_fields(ids, suffix)
  local out = {}
  by_bucket(ids, function(key, i, j)
    local f = {}
    for k = i, j do f[k - i + 1] = sub(ids[k], 15) .. suffix end
    local v = call('HMGET', key, unpack(f))
    for k = i, j do out[k] = v[k - i + 1] end
  end)
  return out
end
local function put_fields(ids, values)
  by_bucket(ids, function(key, i, j)
    local f = {}
    for k = i, j do f[#f + 1] = sub(ids[k], 15); f[#f + 1] = values[k] end
    call('HSET', key, unpack(f))
  end)
end
local function del_fields(ids)
  by_bucket(ids, function(key, i, j)
    local f = {}
    for k = i, j do f[k - i + 1] = sub(ids[k], 15) end
    call('HDEL', key, unpack(f))
  end)
end
local function extra(id, name) return T .. 'j:' .. sub(id, 1, 14), sub(id, 15) .. '#' .. name end

local function parse(rec)
  local h = {}
  h.rank, h.deadline, h.rows, h.bytes, h.mask, h.keep_s, h.pid, h.attempts, h.strikes, h.releases, h.gen, h.flags,
    h.suspect, h.reflen = unpackb(HEAD, rec)
  h.class = math.floor(h.suspect / 2)
  h.suspect = h.suspect % 2
  h.refs, h.payload = sub(rec, 43, 42 + h.reflen), sub(rec, 43 + h.reflen)
  return h
end
local function build(h)
  return pack(HEAD, h.rank, h.deadline, h.rows, h.bytes, h.mask, h.keep_s, h.pid, h.attempts, h.strikes, h.releases,
    h.gen, h.flags, h.suspect + 2 * h.class, #h.refs) .. h.refs .. h.payload
end

-- The pipeline's graph: {ref, linear, all-mask, nodes}; a node: {key, predecessors' mask, successors, predecessors,
-- ready rows high-water, ready bytes high-water, 1 where what it makes may be lost with its worker}. Entry nodes have
-- mask 0.
local graphs = {}
local function graph(pid)
  local g = graphs[pid]
  if not g then
    local packed = call('HGET', GRAPH, pid)
    if not packed then return nil end
    local v = cmsgpack.unpack(packed)
    g = {ref = v[1], linear = v[2] == 1, all = v[3], nodes = {}}
    for i, n in ipairs(v[4]) do
      g.nodes[i] = {index = i, bit = 2 ^ (i - 1), key = n[1], needs = n[2], succs = n[3], preds = n[4], max_rows = n[5],
        max_bytes = n[6], volatile = n[7] == 1}
    end
    graphs[pid] = g
  end
  return g
end

-- The nodes from this one to the last, each of which follows the one before and nothing else; nil where they do not.
local function chain(g, node, last)
  local steps = {node}
  while node.index ~= last do
    local n = #node.succs == 1 and g.nodes[node.succs[1]]
    if not n or #n.preds ~= 1 then return nil end
    steps[#steps + 1] = n
    node = n
  end
  return steps, node
end

-- Load counters and ready entries are gathered, then written once by flush().
local loads, readies, ready_order = {}, {}, {}
local function count(field, delta) loads[field] = (loads[field] or 0) + delta end
-- Wakes and replies are hints: a foreign key in their place must not stop the transition half way.
local function wake(key)
  local k = T .. 'wake:' .. key
  if redis.pcall('LLEN', k) == 0 then call('RPUSH', k, 1) end
end
local function make_ready(node, id, rank, rows, bytes)
  local z = readies[node.key]
  if not z then z = {}; readies[node.key] = z; ready_order[#ready_order + 1] = node.key end
  z[#z + 1] = rank
  z[#z + 1] = id
  count(node.key .. '.ready_rows', rows)
  count(node.key .. '.ready_bytes', bytes)
end

-- Fairness between tenants is start-time fair queueing, and changes ranks alone. A job's tag is the virtual time at which
-- its turn begins: that of the tenant's last job and what that one cost, or now, if that is later. Rank = tag - boost. The
-- cost is rows / weight in ms of about the time that a row takes, so that tags run with the clock and compare with the
-- ranks of jobs without a tenant, who have none of this.
-- Where the next job to be claimed has a tenant and its tag is past already, others begin at that tag, not at the clock:
-- they would wait for all that is behind the clock. This happens while c is too small, or nobody works; by ten minutes
-- at most, so that tenants that are new each time do not keep everyone else waiting for ever.
-- fair:<ref> HASH: v the largest tag that was claimed; c ms per row; since, rows: what was claimed since when, to measure
-- c; b<class> boost of a class; F<priority>:<tenant> where the tenant's next tag begins.
-- tenants HASH: tenant -> weight.
local FIRST_COST, MOST_TENANTS, MOST_BEHIND, FAIR_TTL = 10, 1024, 600000, 86400000
local function fair_key(g) return T .. 'fair:' .. g.ref end
local function number_of(x) return tonumber(x or 0) or 0 end

-- Forgets tenants whose turn is over: they would begin at the virtual time anyway.
local function forget_tenants(key, v, most)
  local fields, left, gone = call('HGETALL', key), 0, {}
  for i = 1, #fields, 2 do
    if sub(fields[i], 1, 1) == 'F' then
      if number_of(fields[i + 1]) <= v then gone[#gone + 1] = fields[i] else left = left + 1 end
    end
  end
  slices('HDEL', key, gone)
  call('HSET', key, 'most', math.max(most, 2 * left))
end
-- A tenant's turns at the entry of this pipeline: take(rows) is the tag of its next job, note() writes how far it came.
local function fair_share(g, priority, tenant, boost)
  local key, own = fair_key(g), 'F' .. priority .. ':' .. tenant
  local s = call('HMGET', key, 'v', 'c', own, 'most')
  local v, c, at, most = number_of(s[1]), number_of(s[2]), number_of(s[3]), number_of(s[4])
  local weight = number_of(call('HGET', T .. 'tenants', tenant))
  local head = {}
  for _, n in ipairs(g.nodes) do
    if n.needs == 0 and #head == 0 then head = call('ZRANGE', T .. 'ready:' .. n.key, 0, 0, 'WITHSCORES') end
  end
  local first = #head > 0 and get_fields({head[1]}, '')[1]
  local class = first and parse(first).class or 0
  local tag = class > 0 and tonumber(head[2]) + number_of(call('HGET', key, 'b' .. class)) or NOW
  if #head == 0 then
    -- Nobody waits: who came before has no more claim, and no more debt.
    v, at = 0, 0
    call('DEL', key)
  end
  v = tag < NOW and math.max(tag, NOW - MOST_BEHIND) or math.max(v, NOW)
  if c <= 0 then c = FIRST_COST end
  if weight <= 0 then weight = 1 end
  local share = {}
  function share.take(rows)
    local tag = math.max(at, v)
    at = tag + math.max(rows, 1) * c / weight
    return tag
  end
  function share.note()
    call('HSET', key, own, string.format('%.3f', at), 'c', string.format('%.6f', c),
      'b' .. (tonumber(priority) + 1), string.format('%.3f', boost))
    call('PEXPIRE', key, FAIR_TTL)
    if call('HLEN', key) > math.max(most, MOST_TENANTS) then forget_tenants(key, math.max(v, NOW), MOST_TENANTS) end
  end
  return share
end
-- Jobs with a tenant were claimed at an entry: class -> the worst rank among them; so many rows, with others left or not.
local function fair_served(g, leads, rows, left)
  local key, fields, ranks = fair_key(g), {'v', 'c', 'since', 'rows'}, {}
  for class, rank in pairs(leads) do
    fields[#fields + 1] = 'b' .. class
    ranks[#ranks + 1] = rank
  end
  local s = redis.pcall('HMGET', key, unpack(fields))
  if s.err then return end
  local v, c, since = number_of(s[1]), number_of(s[2]), number_of(s[3])
  for i, rank in ipairs(ranks) do v = math.max(v, rank + number_of(s[4 + i])) end
  rows = math.max(rows, 1) + (since > 0 and number_of(s[4]) or 0)
  if c <= 0 then c = FIRST_COST end
  local took = NOW - since
  if since > 0 and took >= 1000 then
    -- Half way to what was measured, and a quarter more: tags ahead of the clock are better than tags behind it. After a
    -- long pause nobody knows what a row takes.
    if took < 10000 then c = math.sqrt(c * 1.25 * took / rows) end
    since = 0
  end
  if left == 0 then since = 0 elseif since == 0 then since, rows = NOW, 0 end
  call('HSET', key, 'v', string.format('%.3f', v), 'c', string.format('%.6f', c), 'since', since, 'rows', rows)
  call('PEXPIRE', key, FAIR_TTL)
end

-- Grant entries travel as id followed by one byte 128 + generation.
local ENTRY = '([%w~]+)([\128-\255])'
local function entry(id, gen) return id .. char(128 + gen) end

-- Refs of a record: 'name:chunks:bytes:consumers,' each. consumers 0 marks a result; node 0 in the name, the input.
-- 'name:0:bytes:consumers:host,': Redis has nothing of it, it lies in the shared memory of that host alone.
local REF = '([^:,]+):(%d+):(%d+):(%d+):?(%x*),'
local function ref_text(name, chunks, bytes, consumers, host)
  if #host > 0 then consumers = consumers .. ':' .. host end
  return name .. ':' .. chunks .. ':' .. bytes .. ':' .. consumers .. ','
end
local function is_input(name) return string.find(name, '^[%w~]+%.0%.') ~= nil end
local doomed = {}
local function doom_refs(refs, keep_results)
  local kept = {}
  for name, chunks, bytes, consumers in string.gmatch(refs, REF) do
    if keep_results and consumers == '0' then
      kept[#kept + 1] = name .. ':' .. chunks .. ':' .. bytes .. ':0,'
    else
      doomed[#doomed + 1] = T .. 'blob:' .. name
    end
  end
  return table.concat(kept)
end
local function refs_bytes(refs)
  local total = 0
  for _, _, bytes in string.gmatch(refs, REF) do total = total + tonumber(bytes) end
  return math.min(total, MOST)
end
local function blobs_complete(refs)
  for name, chunks in string.gmatch(refs, REF) do
    if call('HLEN', T .. 'blob:' .. name) ~= tonumber(chunks) then return false end
  end
  return true
end
local function persist_refs(refs)
  for name in string.gmatch(refs, REF) do call('PERSIST', T .. 'blob:' .. name) end
end

-- Where somebody copies what lies in a host's shared memory to Redis, this stands, and tells so.
local function answers(host) return call('EXISTS', T .. 'host:' .. host) == 1 end
-- Asks a host for what it has of a job that waits at this node (0: of a dead letter) and reads with these bits; it is
-- due at a time, or sooner where that was said before. Whether this is news. A hint: pcall, as with wakes.
local function ask_host(host, id, index, bits, at)
  local key = T .. 'spill:' .. host
  local news = redis.pcall('ZADD', key, 'LT', 'CH', at, id .. '|' .. index .. '|' .. bits) == 1
  if news then
    call('PEXPIRE', key, 3600000)
    wake('@' .. host)
  end
  return news
end
-- The same of every host that has some of it and answers; without bits, of whatever the job refers to.
local function ask_hosts(refs, id, index, bits)
  local asked = {}
  for _, _, _, consumers, host in string.gmatch(refs, REF) do
    if host ~= '' and not asked[host] and (not bits or band(tonumber(consumers), bits) > 0) then
      asked[host] = true
      if answers(host) then ask_host(host, id, index, bits or 0, NOW) end
    end
  end
end

-- Where a job can be ready or delayed now: the nodes whose predecessors are done and that are not done themselves.
local function open_nodes(g, mask)
  local out = {}
  for i, n in ipairs(g.nodes) do
    if band(mask, n.bit) == 0 and band(mask, n.needs) == n.needs then out[#out + 1] = n end
  end
  return out
end
-- The rows and bytes that the load counters hold for this entry, and its own counters.
local function fork_state(id, node)
  local key, field = extra(id, node.index)
  local v = call('HGET', key, field)
  if not v then return nil end
  local s = {}
  s.attempts, s.strikes, s.releases, s.suspect, s.rows, s.bytes = unpackb(FORK, v)
  s.payload = sub(v, 13)
  return s
end
local function put_fork(id, node, s)
  local key, field = extra(id, node.index)
  call('HSET', key, field, pack(FORK, s.attempts, s.strikes, s.releases, s.suspect, s.rows, s.bytes) .. s.payload)
end
local function state_of(g, id, h, node)
  if g.linear then return h end
  return fork_state(id, node)
end
-- Whether a job waits at this node, ready or delayed. pcall: a foreign key in one pipeline's place must not stop what
-- ends jobs of all.
local function waits(node, id)
  return type(redis.pcall('ZSCORE', T .. 'ready:' .. node.key, id)) == 'string'
    or call('ZSCORE', DELAYED, id .. '|' .. node.index)
end
local function leave_queue(g, id, h, n)
  if redis.pcall('ZREM', T .. 'ready:' .. n.key, id) == 1 then
    local s = state_of(g, id, h, n)
    count(n.key .. '.ready_rows', -s.rows)
    count(n.key .. '.ready_bytes', -s.bytes)
  else
    call('ZREM', DELAYED, id .. '|' .. n.index)
  end
end
local function leave_queues(g, id, h)
  for _, n in ipairs(open_nodes(g, h.mask)) do leave_queue(g, id, h, n) end
end
-- Makes a job of a fork ready at a node where it has no entry yet. The rows are its predecessors', or the input's.
local function open_fork(g, id, h, node)
  local rows, bytes = h.rows, h.bytes
  for _, p in ipairs(node.preds) do
    local s = p > 0 and fork_state(id, g.nodes[p])
    if s then rows, bytes = s.rows, s.bytes end
  end
  put_fork(id, node, {attempts = 0, strikes = 0, releases = 0, suspect = 0, rows = rows, bytes = bytes, payload = ''})
  make_ready(node, id, h.rank, rows, bytes)
end

-- Terminal records: status, flags, attempts, generation, node, rows, bytes, keep_s, length of refs; then the key's
-- digest (16 bytes) when keyed, refs, payload. Status: k done, f failed, c cancelled, d past its deadline.
local TERMINAL = '<BBBBBI4I4I4I2'
local gone, dones, doneq, replies, reply_order = {}, {}, {}, {}, {}
local function reply_to(client, id, rec)
  local q = replies[client]
  if not q then q = {}; replies[client] = q; reply_order[#reply_order + 1] = client end
  q[#q + 1] = pack('<BI4', #id, #rec) .. id .. rec
end
local function drop_extras(g, id, h)
  local fields, tail = {}, sub(id, 15)
  if band(h.flags, F_KEYED) > 0 then fields[#fields + 1] = tail .. '#k' end
  if band(h.flags, F_HISTORY) > 0 then fields[#fields + 1] = tail .. '#h' end
  if band(h.flags, F_SUBSCRIBED) > 0 then fields[#fields + 1] = tail .. '#s' end
  if band(h.flags, F_CHECKPOINT) > 0 then fields[#fields + 1] = tail .. '#0'; fields[#fields + 1] = tail .. '#p' end
  if not g.linear then for i = 1, #g.nodes do fields[#fields + 1] = tail .. '#' .. i end end
  if #fields > 0 then call('HDEL', T .. 'j:' .. sub(id, 1, 14), unpack(fields)) end
end
-- Forgets the forms of a linear record that it could go back to. The '#p' of commit.lua may be there though no node is
-- volatile now: the graph was defined anew meanwhile.
local function drop_checkpoint(id, h)
  local key, field = extra(id, '0')
  call('HDEL', key, field, sub(id, 15) .. '#p')
  h.flags = h.flags - F_CHECKPOINT
end
-- Ends a job: its record goes, its terminal record comes, its clients hear of it. The caller took it out of queues.
local function finish(g, id, h, status, node_index, rows, refs, payload)
  gone[#gone + 1] = id
  if h.deadline > 0 then call('ZREM', DEADLINE, id) end
  local keyed, subscribers = '', nil
  if band(h.flags, F_KEYED) > 0 then keyed = call('HGET', extra(id, 'k')) or '' end
  if band(h.flags, F_SUBSCRIBED) > 0 then subscribers = call('HGET', extra(id, 's')) end
  if h.flags > 0 or not g.linear then drop_extras(g, id, h) end
  count(g.ref .. '.' .. status, 1)
  if h.keep_s == 0 then
    doom_refs(refs, false)
    if #keyed > 0 then call('HDEL', KEYED, keyed) end
    return
  end
  local bytes = math.min(#payload + refs_bytes(refs), MOST)
  local rec = pack(TERMINAL, byte(status), h.flags, h.attempts, h.gen, node_index, rows, bytes, h.keep_s, #refs)
    .. keyed .. refs .. payload
  dones[#dones + 1] = id
  dones[#dones + 1] = rec
  doneq[#doneq + 1] = NOW + h.keep_s * 1000
  doneq[#doneq + 1] = id
  count('results.bytes', bytes)
  reply_to(sub(id, 1, 8), id, rec)
  if subscribers then for client in string.gmatch(subscribers, '%w+') do reply_to(client, id, rec) end end
end

-- Writes what was gathered; afterwards a script may gather and flush again.
local function flush()
  if #gone > 0 then del_fields(gone) end
  if #dones > 0 then slices('HSET', DONE, dones); slices('ZADD', DONEQ, doneq) end
  for _, key in ipairs(ready_order) do
    slices('ZADD', T .. 'ready:' .. key, readies[key])
    wake(key)
  end
  for field, delta in pairs(loads) do if delta ~= 0 then call('HINCRBY', LOAD, field, delta) end end
  for _, client in ipairs(reply_order) do
    local k = T .. 'reply:' .. client
    if type(redis.pcall('RPUSH', k, table.concat(replies[client]))) == 'number' then call('PEXPIRE', k, 3600000) end
  end
  for i = 1, #doomed, 4000 do call('UNLINK', unpack(doomed, i, math.min(i + 3999, #doomed))) end
  gone, dones, doneq, replies, reply_order, doomed = {}, {}, {}, {}, {}, {}
  loads, readies, ready_order = {}, {}, {}
end

-- A grant: 'pid.node|rows|entries'. rows is what the load's held_rows still counts for it.
local function read_grant(fence)
  local v = call('HGET', GRANTS, fence)
  if not v then return nil end
  local pid, node, rows, entries = string.match(v, '^(%d+)%.(%d+)|(%d+)|(.*)$')
  return {pid = tonumber(pid), node = tonumber(node), rows = tonumber(rows), entries = entries}
end
-- Takes the given entries out of a grant (all of them, or a part); rows is what those entries counted.
local function shrink_grant(fence, grant, node, taken, whole, rows)
  local left = {}
  if not whole then
    for id, g in string.gmatch(grant.entries, ENTRY) do
      if not taken[id .. g] then left[#left + 1] = id .. g end
    end
  end
  if #left == 0 then
    call('HDEL', GRANTS, fence)
    call('ZREM', LEASE, fence)
    count(node.key .. '.held_rows', -grant.rows)
  else
    call('HSET', GRANTS, fence, string.format('%d.%d|%d|', grant.pid, grant.node, grant.rows - rows) .. table.concat(left))
    count(node.key .. '.held_rows', -rows)
  end
end
-- The entries of an operation: {id, packed, mine = the fence holds it, rec and h = its record when that still agrees}.
local function held_entries(fence, grant, packed)
  local whole = grant ~= nil and grant.entries == packed
  local owned = {}
  if grant and not whole then
    for id, g in string.gmatch(grant.entries, ENTRY) do owned[id .. g] = true end
  end
  local ids, list = {}, {}
  for id, g in string.gmatch(packed, ENTRY) do
    ids[#ids + 1] = id
    list[#list + 1] = {id = id, packed = id .. g, gen = byte(g) - 128}
  end
  local recs = get_fields(ids, '')
  for i, e in ipairs(list) do
    local mine = grant and (whole or owned[e.packed])
    owned[e.packed] = nil
    e.mine = mine
    if mine and recs[i] then
      local h = parse(recs[i])
      if h.gen == e.gen then e.rec = recs[i]; e.h = h end
    end
  end
  return list, whole
end
-- Puts an entry back among the ready with its rank; s holds the counters that the caller changed.
local function put_back(g, id, h, node, s)
  if g.linear then put_fields({id}, {build(h)}) else put_fork(id, node, s) end
  make_ready(node, id, h.rank, s.rows, s.bytes)
end

-- Dead letters keep everything that a redrive needs, and the history of the errors.
local function bury(g, id, h, node_index, err)
  local outputs = {}
  if not g.linear then
    for i, n in ipairs(g.nodes) do
      local s = fork_state(id, n)
      if s and band(h.mask, n.bit) > 0 then outputs[#outputs + 1] = {i, s.rows, s.bytes, s.payload} end
    end
  end
  local history, checkpoint, keyed = '', '', ''
  if band(h.flags, F_HISTORY) > 0 then history = call('HGET', extra(id, 'h')) or '' end
  if band(h.flags, F_CHECKPOINT) > 0 then checkpoint = call('HGET', extra(id, '0')) or '' end
  call('HSET', DEAD, id, cmsgpack.pack({NOW, node_index, build(h), history, outputs, checkpoint, g.ref, ''}))
  ask_hosts(h.refs, id, 0)
  count(g.ref .. '.dead', 1)
  finish(g, id, h, 'f', node_index, h.rows, '', err)
end
local function add_history(id, h, err)
  local key, field = extra(id, 'h')
  local old = band(h.flags, F_HISTORY) > 0 and call('HGET', key, field) or ''
  if #old + #err > 65536 then old = '' end
  call('HSET', key, field, old .. err)
  h.flags = bor(h.flags, F_HISTORY)
end

-- A grant whose worker is gone: entries that still match go back to ready. started: entries that were being computed.
local function requeue(fence, started, solo, max_strikes, err)
  local grant = read_grant(fence)
  if not grant then
    call('ZREM', LEASE, fence)
    return 0, 0
  end
  local g = graph(grant.pid)
  local node = g.nodes[grant.node]
  check_types({LOAD, DONE, DEAD}, {DELAYED, DEADLINE, DONEQ})
  -- Behind a foreign key the grant stays, and stops no other grant's return.
  if not sound(node) then return 0, 0 end
  call('ZREM', LEASE, fence)
  local list = held_entries(fence, grant, grant.entries)
  local back, buried = 0, 0
  for _, e in ipairs(list) do
    if e.rec and band(e.h.mask, node.bit) == 0 then
      local s = state_of(g, e.id, e.h, node)
      if started and started[e.packed] then
        s.suspect = 1
        if solo then s.strikes = math.min(s.strikes + 1, 255) end
      end
      if started and started[e.packed] and solo and s.strikes >= max_strikes then
        e.h.attempts = s.attempts
        leave_queues(g, e.id, e.h)
        add_history(e.id, e.h, err)
        bury(g, e.id, e.h, node.index, err)
        buried = buried + 1
      else
        put_back(g, e.id, e.h, node, s)
        back = back + 1
      end
    end
  end
  call('HDEL', GRANTS, fence)
  count(node.key .. '.held_rows', -grant.rows)
  return back, buried
end

-- Delayed entries whose time has come become ready. Returns how many.
local function promote_due(limit)
  check_types({LOAD}, {})
  local due = call('ZRANGEBYSCORE', DELAYED, '-inf', NOW, 'LIMIT', 0, limit)
  for _, member in ipairs(due) do
    local id, index = string.match(member, '^([%w~]+)|(%d+)$')
    local rec = get_fields({id}, '')[1]
    local h = rec and parse(rec)
    local g = h and graph(h.pid)
    local node = g and g.nodes[tonumber(index)]
    -- Behind a foreign key in the ready set's place it stays delayed, and disturbs no other node's claims.
    if not node or sound(node) then
      call('ZREM', DELAYED, member)
      local s = node and state_of(g, id, h, node)
      if s then make_ready(node, id, h.rank, s.rows, s.bytes) end
    end
  end
  return #due
end
local function expire_job(g, id, h)
  leave_queues(g, id, h)
  doom_refs(h.refs, false)
  finish(g, id, h, 'd', 0, h.rows, '', '')
end
