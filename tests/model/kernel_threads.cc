// Runs what shares a call among threads with a pool of its own, on random sizes, and checks the results.
// tests/support/kernel_lines.py compiles it with ThreadSanitizer, and with AddressSanitizer and UBSan.

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "dots.h"
#include "head.h"
#include "integers.h"
#include "parallel.h"
#include "tiles.h"

namespace {

using namespace logprobd;
using namespace LOGPROBD_NAMESPACE;

// As XLA's: tasks start when they like, some only after the call that made them has returned.
class Pool {
 public:
  explicit Pool(int64_t threads) : threads_(threads) {}
  ~Pool() {
    for (std::thread& thread : running_) thread.join();
  }
  int64_t num_threads() const { return threads_; }
  template <typename Task>
  void Schedule(Task task) {
    running_.emplace_back(std::move(task));
  }

 private:
  const int64_t threads_;
  std::vector<std::thread> running_;
};

void Check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

void EveryItemOnce(Pool& pool, int64_t threads, int64_t count) {
  std::vector<int> seen(static_cast<size_t>(count));
  int* to = seen.data();
  Check(Share(pool, threads, count,
              [to](int64_t first, int64_t last) {
                for (int64_t i = first; i < last; ++i) ++to[i];
              }),
        "a share failed");
  for (const int times : seen) Check(times == 1, "an item was not done once");
}

void MemoryRunsOut(Pool& pool, int64_t threads, int64_t count, int64_t at) {
  const bool done = Share(pool, threads, count, [at](int64_t first, int64_t last) {
    if (first <= at && at < last) throw std::bad_alloc();
  });
  Check(!done, "a share that ran out of memory said that all was done");
}

// x of `Element`s, and a weight of words that are finite in Format.
template <class Format, typename Element>
void Products(Pool& pool, std::mt19937& random, Panel panel, int64_t m, int64_t n, int64_t k) {
  const int64_t blocks = (n + kColumns - 1) / kColumns, depth = (k + Format::kBlock - 1) / Format::kBlock;
  const int64_t stride = sizeof(Element) == 2 ? k : (k + kStep - 1) / kStep * kStep;
  std::vector<Element> x(static_cast<size_t>(m * stride));
  for (int64_t i = 0; i < m * k; ++i) {
    const uint32_t bits = 0x3f00 + random() % 256;  // of a bfloat16
    Element& value = x[static_cast<size_t>(i / k * stride + i % k)];
    if constexpr (sizeof(Element) == 2) {
      value = static_cast<uint16_t>(bits);
    } else {
      value = static_cast<float>(bits % 256) / 256 - 0.5f;
    }
  }
  std::vector<uint32_t> words(static_cast<size_t>(blocks * depth * Format::kWords * kColumns));
  for (uint32_t& word : words) word = 0x3f003f00 + random() % 0x100 * 0x10001;
  const std::vector<uint16_t> scales(static_cast<size_t>(blocks * depth * kColumns), 0x3000);  // 1/8
  std::vector<float> alone(static_cast<size_t>(m * n)), shared(alone.size());
  Problem p = {x.data(), words.data(), scales.data(), nullptr, m, n, k, stride,
               stride * static_cast<int64_t>(sizeof(Element)),
               depth * Format::kWords * kColumns, depth * kColumns, Format::kScaleBytes};
  std::vector<char> rows;
  if constexpr (!kIsFloat<Format>) {
    using Row = RowOf<Format>;
    rows.resize(static_cast<size_t>(depth * Format::kBlock / Format::kGroup * m) * sizeof(Row));
    std::vector<float> dense(static_cast<size_t>(m * k));
    for (int64_t i = 0; i < m * k; ++i) dense[static_cast<size_t>(i)] = x[static_cast<size_t>(i / k * stride + i % k)];
    const bool filled = Share(pool, pool.num_threads(), m, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        FillIntegers<Format>(dense.data(), m, k, r, reinterpret_cast<Row*>(rows.data()));
      }
    });
    Check(filled, "a conversion failed");
    p.x = rows.data(), p.x_stride = m, p.row_bytes = sizeof(Row);
  }
  const auto run = [&](float* y) {
    Problem problem = p;
    problem.y = y;
    return [problem, panel](int64_t first, int64_t last) {
      const FloatMode mode;
      panel(problem, first, last);
    };
  };
  run(alone.data())(0, blocks);
  Check(Share(pool, pool.num_threads(), blocks, run(shared.data())), "a product failed");
  Check(alone == shared, "a product differs by how it is shared");
}

void Rows(Pool& pool, std::mt19937& random, int64_t rows, int64_t vocab, int64_t k, int64_t requested) {
  std::vector<float> logits(static_cast<size_t>(rows * vocab));
  for (float& x : logits) x = static_cast<float>(static_cast<int>(random() % 64)) / 8;  // many are equal
  std::vector<int32_t> ids(static_cast<size_t>(rows)), requested_ids(static_cast<size_t>(rows * requested));
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % vocab);
  for (int32_t& id : requested_ids) id = static_cast<int32_t>(random() % vocab);
  const auto floats = static_cast<size_t>(rows * (2 + k + requested)),
             counts = static_cast<size_t>(rows * (1 + k + requested));
  std::vector<float> found[2] = {std::vector<float>(floats), std::vector<float>(floats)};
  std::vector<int32_t> ranks[2] = {std::vector<int32_t>(counts), std::vector<int32_t>(counts)};
  Pool one(1);
  for (int way = 0; way < 2; ++way) {
    float* f = found[way].data();
    int32_t* c = ranks[way].data();
    auto accumulator = std::make_shared<Accumulator>(TokenLogprobs{rows, vocab, k, requested, ids.data(),
                                                                   requested_ids.data(), f, c, c + rows, f + 2 * rows,
                                                                   f + rows * (2 + k), c + rows * (1 + k), f + rows});
    for (int64_t r = 0; r < rows; ++r) {
      for (Token& token : accumulator->rows[static_cast<size_t>(r)].tokens) {
        token.logit = logits[static_cast<size_t>(r * vocab + token.id)];
      }
    }
    const float* from = logits.data();
    Check(ComputeTokenLogprobs(way == 0 ? one : pool, accumulator,
                               [from, vocab, rows](int64_t panel, int64_t, auto accumulate) {
                                 for (int64_t r = 0; r < rows; ++r) accumulate(r, from + r * vocab + panel * kPanel);
                               }),
          "log-probs failed");
  }
  Check(found[0] == found[1] && ranks[0] == ranks[1], "log-probs differ by how they are shared");
}

}  // namespace

int main() {
  if (!RunsHere()) return 77;
  std::mt19937 random(7);
  const auto below = [&random](int64_t limit) { return static_cast<int64_t>(random() % static_cast<uint64_t>(limit)); };
  for (int round = 0; round < 40; ++round) {
    Pool pool(1 + below(4));
    EveryItemOnce(pool, pool.num_threads(), below(200));
    const int64_t count = 1 + below(100);
    MemoryRunsOut(pool, pool.num_threads(), count, below(count));
    const int64_t m = 1 + below(30), n = 1 + below(300), k = 1 + below(90);
    Products<BFloat16, float>(pool, random, RunPanel<BFloat16, true>, m, n, k);
    Products<Q4K, float>(pool, random, RunIntegers<Q4K>, m, n, k);
    Products<Q8_0, float>(pool, random, RunIntegers<Q8_0>, m, n, k);
#if defined(__AVX512F__)
    if (HasDots()) Products<BFloat16, uint16_t>(pool, random, RunDots, m, n, k);
#endif
    const int64_t vocab = 1 + below(20000);
    Rows(pool, random, 1 + below(4), vocab, below(std::min<int64_t>(vocab, 20) + 1), below(4));
  }
  return 0;
}
