// Splits a call among XLA's own threads.
//
// Waking a thread takes up to 0.2 ms in a virtual machine, longer than most calls of a decode step. So a thread that has
// finished its part of a call keeps looking for the next call for a while.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

#include "vectors.h"

namespace LOGPROBD_NAMESPACE {

constexpr int64_t kClaims = 4;  // a claim is a thread's share of the remaining work, divided by this
constexpr std::chrono::microseconds kPatience(200);  // for which a thread looks for the next call

// A call that threads share. It outlives the call: a thread that joins late finds no work left.
class Job {
 public:
  virtual ~Job() = default;
  virtual void Run() = 0;  // takes part until no work is left
};

// The threads of a process that wait for the next call, and the last one that was announced.
class Helpers {
 public:
  // The calls of one process share the helpers. Of concurrent calls, some may get none.
  static Helpers& OfProcess() {
    static Helpers* const helpers = new Helpers();  // never destroyed: threads may outlive static objects
    return *helpers;
  }

  // Offers a job to up to `count` threads: those that wait, and new tasks of the pool.
  template <typename Pool>
  void Announce(Pool& pool, const std::shared_ptr<Job>& job, int64_t count) {
    uint64_t version;
    {
      const std::lock_guard<std::mutex> guard(lock_);
      job_ = job;
      version = ++version_;
    }
    for (int64_t waiting = waiting_.load(); waiting < count; ++waiting) {
      waiting_.fetch_add(1);
      pool.Schedule([this, job, version] { Wait(job, version); });  // it joins later jobs, even if it starts late
    }
  }

 private:
  // Takes part in a job, then in those that are announced until none is for kPatience.
  void Wait(std::shared_ptr<Job> job, uint64_t seen) {
    auto idle_since = std::chrono::steady_clock::now();
    for (;;) {
      if (job != nullptr) {
        job->Run();
        job = nullptr;
        idle_since = std::chrono::steady_clock::now();
      }
      for (int spins = 0; spins < kSpins && version_.load(std::memory_order_acquire) == seen; ++spins) Pause();
      std::this_thread::yield();
      if (version_.load() != seen) {
        const std::lock_guard<std::mutex> guard(lock_);
        seen = version_.load();
        job = job_;
      } else if (std::chrono::steady_clock::now() - idle_since > kPatience) {
        waiting_.fetch_sub(1);
        return;
      }
    }
  }

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  static constexpr int kSpins = 64;

  std::mutex lock_;
  std::shared_ptr<Job> job_;  // guarded by lock_
  std::atomic<uint64_t> version_{0};
  std::atomic<int64_t> waiting_{0};
};

template <typename Range>
class Claims final : public Job {
 public:
  Claims(Range range, int64_t count, int64_t threads) : range_(std::move(range)), count_(count), threads_(threads) {}

  // Claims ranges until no work is left: large ones first, for long sequential reads, then small ones, so that all
  // threads finish together.
  void Run() override {
    int64_t first = claimed_.load();
    while (first < count_) {
      const int64_t last = first + std::max<int64_t>(1, (count_ - first) / (kClaims * threads_));
      if (!claimed_.compare_exchange_weak(first, last)) continue;
      try {
        if (!failed_) range_(first, last);
      } catch (const std::bad_alloc&) {  // exceptions must not reach XLA's threads
        failed_ = true;
      }
      finished_.fetch_add(last - first);
      first = claimed_.load();
    }
  }

  // All unfinished ranges are claimed by running threads, so this never waits for a thread to start.
  [[nodiscard]] bool Finish() {
    while (finished_.load() < count_) std::this_thread::yield();
    return !failed_;
  }

 private:
  Range range_;
  const int64_t count_, threads_;
  std::atomic<int64_t> claimed_{0};
  std::atomic<int64_t> finished_{0};
  std::atomic<bool> failed_{false};
};

// Calls range(first, last) for pieces of [0, count) that cover it once, on this thread and up to threads - 1 others.
// Returns false if one of them ran out of memory: the work is then incomplete.
template <typename Pool, typename Range>
[[nodiscard]] bool Share(Pool& pool, int64_t threads, int64_t count, Range range) {
  auto job = std::make_shared<Claims<Range>>(std::move(range), count, threads);
  if (threads > 1) Helpers::OfProcess().Announce(pool, job, threads - 1);
  job->Run();
  return job->Finish();
}

}  // namespace LOGPROBD_NAMESPACE
