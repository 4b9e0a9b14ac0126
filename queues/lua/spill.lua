-- spill: records copies of what lay in a host's shared memory alone. From then on any host's worker may claim the job.
-- ARGV[1] host  ARGV[2..] per ref: member (as `spilling` lists it), name, temporary blob that holds the copy ('' when the
--   bytes are gone), its chunks
-- Returns one letter a ref: k recorded; u nothing is there to copy: whoever claims the job finds it lost, and it
--   restarts; s not waited for any more, or recorded before: the copy is dropped.
-- A copy is renamed into its place, so that whoever copies the same twice, or wakes late, harms no copy that is read.
-- A job that was claimed meanwhile is left alone: its worker reads the memory itself.
local bad = begin()
if bad then return bad end
local host = ARGV[1]
local ASKED = T .. 'spill:' .. host
check_types({DEAD}, {ASKED, DELAYED})

-- The ref among these, rewritten; nil where it is not, or not of this host. Also whether more of its nodes' is here.
local function rewritten(refs, wanted, chunks, bits)
  local out, found, more = {}, false, false
  for name, had, bytes, consumers, at in string.gmatch(refs, REF) do
    if name == wanted and at == host then
      found = true
      out[#out + 1] = ref_text(name, chunks, bytes, consumers, '')
    else
      out[#out + 1] = ref_text(name, had, bytes, consumers, at)
      more = more or at == host and (bits == 0 or band(tonumber(consumers), bits) > 0)
    end
  end
  return found and table.concat(out), more
end

-- The record that the member means, and how it is written back; nil where nobody waits for it.
local function find(id, index)
  if index == 0 then
    local packed = call('HGET', DEAD, id)
    local d = packed and cmsgpack.unpack(packed)
    if not d or d[8] ~= '' then return nil end
    return parse(d[3]), function(h)
      d[3] = build(h)
      call('HSET', DEAD, id, cmsgpack.pack(d))
    end
  end
  local rec = get_fields({id}, '')[1]
  local h = rec and parse(rec)
  local g = h and graph(h.pid)
  local node = g and g.nodes[index]
  if not node or not waits(node, id) then return nil, nil, node end
  return h, function(changed) put_fields({id}, {build(changed)}) end, node
end

local status, woken = {}, {}
for i = 2, #ARGV, 4 do
  local member, name, copy, chunks = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local id, index, bits = string.match(member, '^([%w~]+)|(%d+)|(%d+)$')
  local h, write, node = find(id, tonumber(index))
  local whole = copy == '' or call('HLEN', T .. 'blob:' .. copy) == tonumber(chunks)
  local refs, more
  if h and whole then refs, more = rewritten(h.refs, name, copy == '' and '0' or chunks, tonumber(bits)) end
  if refs then
    h.refs = refs
    write(h)
    if copy ~= '' then
      call('RENAME', T .. 'blob:' .. copy, T .. 'blob:' .. name)
      call('PERSIST', T .. 'blob:' .. name)
    end
    status[#status + 1] = copy == '' and 'u' or 'k'
  else
    if copy ~= '' then call('UNLINK', T .. 'blob:' .. copy) end
    status[#status + 1] = 's'
  end
  -- A copy that is cut is made again; else the member is settled with the last of its refs.
  if not h or refs and not more then
    call('ZREM', ASKED, member)
    if node then woken[node.key] = true end
  elseif not whole then
    call('ZADD', ASKED, 'XX', NOW + 1000, member)
  end
end
for key in pairs(woken) do wake(key) end
return table.concat(status)
