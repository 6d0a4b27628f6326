-- Correct what was taken: give back to the bucket it came from, while that counts; take more from the open one.
-- KEYS as in take.lua. ARGV: now in ms (-1: this server's clock), then for each: bucket, delta, width_ms, buckets.
local now = tonumber(ARGV[1])
if now < 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
for i, key in ipairs(KEYS) do
  local at = 2 + (i - 1) * 4
  local bucket, delta = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  local width, buckets = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  if delta > 0 then
    redis.call('HINCRBY', key, math.floor(now / width), delta)
    redis.call('PEXPIRE', key, (buckets + 1) * width)
  else
    local count = tonumber(redis.call('HGET', key, bucket) or 0)
    if count > 0 then redis.call('HINCRBY', key, bucket, -math.min(count, -delta)) end
  end
end
return 1
