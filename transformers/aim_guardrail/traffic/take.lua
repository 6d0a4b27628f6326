-- Take of all limits what a request needs, or of none. The same as windows.py, in one step for all replicas.
-- KEYS: a hash of bucket -> count for each limit. ARGV: now in ms (-1: this server's clock), then for each
-- limit: limit, cost, width_ms, buckets. Answers {taken, used, wait_ms, reset_ms, bucket, used, ...}.
local now = tonumber(ARGV[1])
if now < 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

local answer, fits = {1}, true
for i, key in ipairs(KEYS) do
  local at = 2 + (i - 1) * 4
  local limit, cost = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  local width, buckets = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local bucket = math.floor(now / width)
  local live, used, last = {}, 0, nil
  local flat = redis.call('HGETALL', key)
  for f = 1, #flat, 2 do
    local b, n = tonumber(flat[f]), tonumber(flat[f + 1])
    if b < bucket - buckets then
      redis.call('HDEL', key, flat[f])
    elseif n > 0 then
      live[#live + 1] = {b, n}
      used = used + n
    end
  end
  table.sort(live, function(one, other) return one[1] < other[1] end)
  local function free(b) return (b + 1 + buckets) * width - now end

  local over, wait = used + cost - limit, 0
  if cost > limit then
    wait = -1
  elseif over > 0 then
    for _, each in ipairs(live) do
      over = over - each[2]
      if over <= 0 then
        wait = free(each[1])
        break
      end
    end
  end
  fits = fits and wait == 0
  local reset = 0
  if #live > 0 then reset = free(live[#live][1]) end
  for _, value in ipairs({used, wait, reset, bucket}) do answer[#answer + 1] = value end
end

if not fits then
  answer[1] = 0
  return answer
end
for i, key in ipairs(KEYS) do
  local at = 2 + (i - 1) * 4
  local cost, width, buckets = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  if cost > 0 then
    local bucket = answer[1 + i * 4]
    redis.call('HINCRBY', key, bucket, cost)
    redis.call('PEXPIRE', key, (buckets + 1) * width)
    answer[(i - 1) * 4 + 2] = answer[(i - 1) * 4 + 2] + cost
    answer[(i - 1) * 4 + 4] = (bucket + 1 + buckets) * width - now
  end
end
return answer
