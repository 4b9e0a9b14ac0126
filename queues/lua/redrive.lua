-- redrive: a dead letter becomes a new job <id>~n that starts at the node where it died (rule 8).
-- ARGV[1] 'redrive' or 'drop'  ARGV[2..] ids
-- Returns per job the new id ('' when there is no such dead letter; for a drop, the id itself). Repeating a redrive
-- returns the same new id. What was redriven stays listed for a week with its history.
local bad = begin()
if bad then return bad end
check_types({LOAD, DEAD}, {DONEQ})
local out = {}
local function revive(id, d)
  local h = parse(d[3])
  local g = graph(h.pid)
  check_ready(g.nodes)
  local base, n = string.match(id, '^(%w+)~(%d+)$')
  local new = (base or id) .. '~' .. (tonumber(n or 0) + 1)
  h.attempts, h.strikes, h.releases, h.suspect, h.gen, h.deadline = 0, 0, 0, 0, 0, 0
  h.flags = band(h.flags, F_UNTIL_ACK + F_HIGH + F_TABLE + F_KEEP)
  if h.keep_s == 0 then h.keep_s = 3600 end
  local key, field = extra(new, '0')
  if #d[6] > 0 then
    call('HSET', key, field, d[6])
    h.flags = bor(h.flags, F_CHECKPOINT)
  end
  put_fields({new}, {build(h)})
  for _, o in ipairs(d[5]) do
    put_fork(new, g.nodes[o[1]], {attempts = 0, strikes = 0, releases = 0, suspect = 0, rows = o[2], bytes = o[3], payload = o[4]})
  end
  for _, node in ipairs(open_nodes(g, h.mask)) do
    if g.linear then make_ready(node, new, h.rank, h.rows, h.bytes) else open_fork(g, new, h, node) end
  end
  call('HSET', DEAD, id, cmsgpack.pack({d[1], d[2], '', d[4], {}, '', d[7], new}))
  call('ZADD', DONEQ, NOW + 604800000, 'dead:' .. id)
  count(d[7] .. '.dead', -1)
  return new
end
for i = 2, #ARGV do
  local id = ARGV[i]
  local packed = call('HGET', DEAD, id)
  local d = packed and cmsgpack.unpack(packed)
  if not d then out[#out + 1] = ''
  elseif ARGV[1] == 'drop' then
    if d[8] == '' then
      doom_refs(parse(d[3]).refs, false)
      count(d[7] .. '.dead', -1)
    end
    call('HDEL', DEAD, id)
    out[#out + 1] = id
  elseif d[8] ~= '' then out[#out + 1] = d[8]
  else out[#out + 1] = revive(id, d) end
end
flush()
return out
