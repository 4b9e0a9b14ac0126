-- expire: ends jobs whose deadline passed, wherever they are.
-- ARGV[1] most at a time
-- Returns how many.
local bad = begin()
if bad then return bad end
local due = call('ZRANGEBYSCORE', DEADLINE, '-inf', NOW, 'LIMIT', 0, tonumber(ARGV[1]))
check_types({LOAD, DONE}, {DELAYED, DONEQ})
local recs = get_fields(due, '')
for i, id in ipairs(due) do
  if recs[i] then
    local h = parse(recs[i])
    expire_job(graph(h.pid), id, h)
  else
    call('ZREM', DEADLINE, id)
  end
end
flush()
return #due
