-- submit: writes jobs durably and makes their first nodes' entries ready.
-- KEYS[12] the client's session
-- ARGV[1] operation  ARGV[2] pipeline number  ARGV[3] limit of unread results, bytes
-- ARGV[4] '' or priority:tenant, of all these jobs: start-time fair queueing then makes their ranks (see lib.lua)
-- ARGV[5..] per job: id, head (boost_ms, delay_ms, deadline_in_ms, rows, bytes, keep_s, flags, length of refs; refs;
--           when keyed, 16 bytes of key digest and 16 of content digest), payload
-- Returns statuses, one letter a job, then '|' and the ids of the jobs that keys named, each with ','.
--   n new; d this id is live already; t this id ended already; k the key's job is live; e the key's job ended
--   (its terminal record is pushed again); x the key was used with other content; b its blobs are incomplete
-- Refuses all, with nothing written: TRFULL rows|bytes|results, TRNOPIPE, TRARGS. Out of memory refuses it too (rule 5).
local bad = begin(true)
if bad then return bad end
local SESS = KEYS[12]
local seq = tonumber(ARGV[1])
local old, stale = replayed(SESS, seq)
if old or stale then return old or stale end
local pid = tonumber(ARGV[2])
local g = graph(pid)
if not g then return refuse('TRNOPIPE', ARGV[2]) end

-- A rank that is no number would be refused by the server half way.
local MOST_MS = 2 ^ 50
local ids = {}
for i = 5, #ARGV, 3 do ids[#ids + 1] = ARGV[i] end
local live = get_fields(ids, '')
local ended = call('HMGET', DONE, unpack(ids))
local status, named, fresh = {}, {}, {}
local keys_here, ids_here = {}, {}
local rows, bytes = 0, 0
for i, id in ipairs(ids) do
  local head = ARGV[3 * i + 3]
  local j = {id = id, payload = ARGV[3 * i + 4]}
  j.boost, j.delay, j.deadline, j.rows, j.bytes, j.keep_s, j.flags, j.reflen = unpackb('<dddI4I4I4BI2', head)
  j.refs = sub(head, 40, 39 + j.reflen)
  if not (math.abs(j.boost) < MOST_MS and math.abs(j.delay) < MOST_MS and math.abs(j.deadline) < MOST_MS) then
    return refuse('TRARGS', 'job ' .. id .. ': boost, delay and deadline must be numbers below 2^50 ms')
  end
  local s
  if live[i] or ids_here[id] then s = 'd' elseif ended[i] then s = 't' end
  if not s and band(j.flags, F_KEYED) > 0 then
    j.key, j.content = sub(head, 40 + j.reflen, 55 + j.reflen), sub(head, 56 + j.reflen)
    local known = keys_here[j.key] or call('HGET', KEYED, j.key)
    if known then
      j.same = sub(known, 17)
      j.ended = call('HGET', DONE, j.same)
      -- A key whose job somebody deleted is free.
      if not (j.ended or keys_here[j.key] or get_fields({j.same}, '')[1]) then known = nil end
    end
    if known then
      named[#named + 1] = j.same
      s = sub(known, 1, 16) == j.content and 'k' or 'x'
    end
  end
  if not s and not blobs_complete(j.refs) then s = 'b' end
  if not s then
    s = 'n'
    fresh[#fresh + 1] = j
    ids_here[id] = true
    if j.key then keys_here[j.key] = j.content .. id end
    if j.delay <= 0 then rows = rows + j.rows; bytes = bytes + j.bytes end
  end
  j.status = s
  status[i] = s
  if s == 'k' then
    if j.ended then status[i] = 'e'; reply_to(sub(id, 1, 8), j.same, j.ended) end
    fresh[-i] = j
  end
end

if rows > 0 or bytes > 0 then
  for _, n in ipairs(g.nodes) do
    if n.needs == 0 then
      local l = call('HMGET', LOAD, n.key .. '.ready_rows', n.key .. '.ready_bytes')
      local r, b = tonumber(l[1] or 0), tonumber(l[2] or 0)
      if r > 0 and r + rows > n.max_rows then return refuse('TRFULL', 'rows ' .. n.key .. ' ' .. r .. ' ' .. n.max_rows) end
      if b > 0 and b + bytes > n.max_bytes then return refuse('TRFULL', 'bytes ' .. n.key .. ' ' .. b .. ' ' .. n.max_bytes) end
    end
  end
  local unread = tonumber(call('HGET', LOAD, 'results.bytes') or 0)
  if unread > tonumber(ARGV[3]) then return refuse('TRFULL', 'results - ' .. unread .. ' ' .. ARGV[3]) end
end

check_types({LOAD, KEYED}, {DELAYED, DEADLINE})
for _, n in ipairs(g.nodes) do if n.needs == 0 then check_ready({n}) end end
local priority, tenant = string.match(ARGV[4], '^(%d+):(.+)$')
local fair = tenant and #fresh > 0 and fair_share(g, priority, tenant, fresh[1].boost)
local new_ids, values, due, deadlines, keyed, delayed = {}, {}, {}, {}, {}, {}
for i, j in ipairs(fresh) do
  local at = NOW + math.max(j.delay, 0)
  local tag = at
  if fair then
    tag = fair.take(j.rows)
    if j.delay > 0 then tag = math.max(tag, at) end
  end
  local h = {rank = tag - j.boost, class = tenant and tonumber(priority) + 1 or 0, deadline = 0, rows = j.rows, bytes = j.bytes, mask = 0, keep_s = j.keep_s, pid = pid,
    attempts = 0, strikes = 0, releases = 0, gen = 0, flags = j.flags, suspect = 0, refs = j.refs, payload = j.payload}
  if j.deadline > 0 then
    h.deadline = NOW + j.deadline
    deadlines[#deadlines + 1] = h.deadline
    deadlines[#deadlines + 1] = j.id
  end
  new_ids[i], values[i] = j.id, build(h)
  j.h = h
end
if fair then fair.note() end
put_fields(new_ids, values)
for _, j in ipairs(fresh) do
  local h = j.h
  if j.reflen > 0 then persist_refs(j.refs) end
  if j.key then
    keyed[#keyed + 1] = j.key
    keyed[#keyed + 1] = j.content .. j.id
    local key, field = extra(j.id, 'k')
    call('HSET', key, field, j.key)
  end
  for _, n in ipairs(g.nodes) do
    if n.needs == 0 then
      if not g.linear then
        put_fork(j.id, n, {attempts = 0, strikes = 0, releases = 0, suspect = 0, rows = h.rows, bytes = h.bytes, payload = ''})
      end
      if j.delay > 0 then
        delayed[#delayed + 1] = NOW + j.delay
        delayed[#delayed + 1] = j.id .. '|' .. n.index
      else
        make_ready(n, j.id, h.rank, h.rows, h.bytes)
      end
    end
  end
end
if #keyed > 0 then slices('HSET', KEYED, keyed) end
if #deadlines > 0 then slices('ZADD', DEADLINE, deadlines) end
if #delayed > 0 then slices('ZADD', DELAYED, delayed) end
-- Another client that names a live job hears of its end too, and the record is kept as long as the longest asks.
for i = 1, #ids do
  local j = fresh[-i]
  if j and status[i] == 'k' then
    local h = parse(get_fields({j.same}, '')[1])
    local key, field = extra(j.same, 's')
    local subs = band(h.flags, F_SUBSCRIBED) > 0 and call('HGET', key, field) or ''
    local client = sub(j.id, 1, 8)
    local joins = client ~= sub(j.same, 1, 8) and #subs < 16 * 9 and not string.find(subs, client, 1, true)
    if joins then
      call('HSET', key, field, subs .. client .. ' ')
      h.flags = bor(h.flags, F_SUBSCRIBED)
    end
    if joins or j.keep_s > h.keep_s then
      h.keep_s = math.max(h.keep_s, j.keep_s)
      put_fields({j.same}, {build(h)})
    end
  end
end
flush()
local result = table.concat(status) .. '|' .. table.concat(named, ',')
remember(SESS, seq, result)
return result
