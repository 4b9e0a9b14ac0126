-- spilling: which jobs are waited for whose bytes lie in this host's shared memory alone. The host says with it that it
-- answers, for so long.
-- ARGV[1] host  ARGV[2] how many jobs at most  ARGV[3] ttl_ms; 0 when it answers no more, and nothing is listed then
-- Returns {ms until the next is due or -1, then per job {member, refs texts to copy, payloads that tell where they lie...}}.
-- A member is id|node|mask of the nodes that read (node 0: a dead letter). One that waits no more, or needs nothing of
-- this host, is forgotten. What is listed stays so until `spill` settles it: whoever copies may die.
local bad = begin()
if bad then return bad end
local host, ttl_ms = ARGV[1], tonumber(ARGV[3])
local HERE, ASKED = T .. 'host:' .. host, T .. 'spill:' .. host
if ttl_ms == 0 then
  call('DEL', HERE)
  return {-1}
end
call('SET', HERE, 1, 'PX', ttl_ms)
local due = redis.pcall('ZRANGE', ASKED, 0, tonumber(ARGV[2]) - 1, 'WITHSCORES')
if due.err then return {-1} end

local function needed(refs, bits)
  local found = {}
  for name, chunks, bytes, consumers, at in string.gmatch(refs, REF) do
    if at == host and (bits == 0 or band(tonumber(consumers), bits) > 0) then
      found[#found + 1] = ref_text(name, chunks, bytes, consumers, at)
    end
  end
  return table.concat(found)
end

local function waiting(id, index, bits)
  local rec = get_fields({id}, '')[1]
  local h = rec and parse(rec)
  local g = h and graph(h.pid)
  local node = g and g.nodes[index]
  if not node then return nil end
  if not waits(node, id) then return nil, node end
  local job = {'', needed(h.refs, bits), h.payload}
  for _, p in ipairs(node.preds) do
    local s = p > 0 and not g.linear and fork_state(id, g.nodes[p])
    if s then job[#job + 1] = s.payload end
  end
  return job
end

local function dead(id)
  local packed = call('HGET', DEAD, id)
  local d = packed and cmsgpack.unpack(packed)
  if not d or d[8] ~= '' then return nil end
  local h = parse(d[3])
  local job = {'', needed(h.refs, 0), h.payload}
  for _, o in ipairs(d[5]) do job[#job + 1] = o[4] end
  if #d[6] > 0 then job[#job + 1] = parse(d[6]).payload end
  return job
end

local out, wait = {-1}, -1
for i = 1, #due, 2 do
  local left = tonumber(due[i + 1]) - NOW
  if left > 0 then
    wait = math.ceil(left)
    break
  end
  local id, index, bits = string.match(due[i], '^([%w~]+)|(%d+)|(%d+)$')
  local job, node = nil, nil
  if index == '0' then job = dead(id) elseif id then job, node = waiting(id, tonumber(index), tonumber(bits)) end
  if job and #job[2] > 0 then
    job[1] = due[i]
    out[#out + 1] = job
  else
    call('ZREM', ASKED, due[i])
    -- A worker of this host took it: who asked may ask for another.
    if node then wake(node.key) end
  end
end
out[1] = wait
return out
