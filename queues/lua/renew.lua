-- renew: prolongs leases, and tells which of their jobs nobody wants any more.
-- ARGV[1] lease_ms  ARGV[2..] fences
-- Returns per fence {1 held or 0 gone, entries that were cancelled, expired or restarted meanwhile}.
local bad = begin()
if bad then return bad end
local out = {}
for i = 2, #ARGV do
  local fence = ARGV[i]
  local grant = read_grant(fence)
  if grant then
    call('ZADD', LEASE, 'XX', NOW + tonumber(ARGV[1]), fence)
    local revoked = {}
    for _, e in ipairs(held_entries(fence, grant, grant.entries)) do
      if not e.rec then revoked[#revoked + 1] = e.packed end
    end
    out[#out + 1] = {1, table.concat(revoked)}
  else
    out[#out + 1] = {0, ''}
  end
end
return out
