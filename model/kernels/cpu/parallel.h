// How a call is shared among XLA's own threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <utility>

namespace logprobd {

constexpr int64_t kClaims = 4;  // a claim is a thread's share of what is left, over this

// What the threads of one call share. It outlives the call: a task that the pool starts late finds nothing left.
template <typename Range>
struct Job {
  Range range;
  int64_t count, threads;
  std::atomic<int64_t> claimed{0};
  std::atomic<int64_t> finished{0};
  std::atomic<bool> failed{false};

  Job(Range run, int64_t items, int64_t workers) : range(std::move(run)), count(items), threads(workers) {}
};

// Takes ranges until nothing is left: large ones first, so that reads run on, then small ones, so that all end
// together.
template <typename Range>
void Work(Job<Range>& job) {
  int64_t first = job.claimed.load();
  while (first < job.count) {
    const int64_t last = first + std::max<int64_t>(1, (job.count - first) / (kClaims * job.threads));
    if (!job.claimed.compare_exchange_weak(first, last)) continue;
    try {
      if (!job.failed) job.range(first, last);
    } catch (const std::bad_alloc&) {  // the pool's threads are XLA's: nothing may be thrown there
      job.failed = true;
    }
    job.finished.fetch_add(last - first);
    first = job.claimed.load();
  }
}

// Calls range(first, last) for pieces of [0, count) that cover it once, on this thread and up to threads - 1 others.
// False where memory ran out in one of them: then not all was done.
template <typename Pool, typename Range>
[[nodiscard]] bool Share(Pool& pool, int64_t threads, int64_t count, Range range) {
  auto job = std::make_shared<Job<Range>>(std::move(range), count, threads);
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([job] { Work(*job); });
  Work(*job);
  // Whatever is not finished was claimed by a thread that is at work on it: never a wait for a task to start.
  while (job->finished.load() < count) std::this_thread::yield();
  return !job->failed;
}

}  // namespace logprobd
