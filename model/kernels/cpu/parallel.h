// Splits a call among XLA's own threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <utility>

namespace logprobd {

constexpr int64_t kClaims = 4;  // a claim is a thread's share of the remaining work, divided by this

// State shared by the threads of one call. It outlives the call: a task that the pool starts late finds no work left.
template <typename Range>
struct Job {
  Range range;
  int64_t count, threads;
  std::atomic<int64_t> claimed{0};
  std::atomic<int64_t> finished{0};
  std::atomic<bool> failed{false};

  Job(Range run, int64_t items, int64_t workers) : range(std::move(run)), count(items), threads(workers) {}
};

// Claims ranges until no work is left: large ones first, for long sequential reads, then small ones, so that all
// threads finish together.
template <typename Range>
void RunClaims(Job<Range>& job) {
  int64_t first = job.claimed.load();
  while (first < job.count) {
    const int64_t last = first + std::max<int64_t>(1, (job.count - first) / (kClaims * job.threads));
    if (!job.claimed.compare_exchange_weak(first, last)) continue;
    try {
      if (!job.failed) job.range(first, last);
    } catch (const std::bad_alloc&) {  // exceptions must not reach XLA's threads
      job.failed = true;
    }
    job.finished.fetch_add(last - first);
    first = job.claimed.load();
  }
}

// Calls range(first, last) for pieces of [0, count) that cover it once, on this thread and up to threads - 1 others.
// Returns false if one of them ran out of memory: the work is then incomplete.
template <typename Pool, typename Range>
[[nodiscard]] bool Share(Pool& pool, int64_t threads, int64_t count, Range range) {
  auto job = std::make_shared<Job<Range>>(std::move(range), count, threads);
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([job] { RunClaims(*job); });
  RunClaims(*job);
  // All unfinished ranges are claimed by running threads, so this never waits for a task to start.
  while (job->finished.load() < count) std::this_thread::yield();
  return !job->failed;
}

}  // namespace logprobd
