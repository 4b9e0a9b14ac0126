-- cancel: ends live jobs. Holders need no notice: their commits find no record and answer stale.
-- ARGV ids
-- Returns one letter a job: w cancelled by this call, t it had ended, u unknown here.
local bad = begin()
if bad then return bad end
if #ARGV == 0 then return '' end
local recs = get_fields(ARGV, '')
local ended = call('HMGET', DONE, unpack(ARGV))
check_types({LOAD}, {DELAYED, DEADLINE, DONEQ})
local status, seen = {}, {}
for i, id in ipairs(ARGV) do
  if seen[id] then status[i] = 't'
  elseif recs[i] then
    local h = parse(recs[i])
    local g = graph(h.pid)
    leave_queues(g, id, h)
    doom_refs(h.refs, false)
    finish(g, id, h, 'c', 0, h.rows, '', '')
    status[i] = 'w'
    seen[id] = true
  else
    status[i] = ended[i] and 't' or 'u'
  end
end
flush()
return table.concat(status)
