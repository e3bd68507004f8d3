// The arithmetic of head.cc: log-prob, unique rank and exact top-k of rows of logits, panel by panel as they come,
// on as many threads as there are.
//
// The promise: a row's numbers depend on its own logits alone. A panel is 1,024 columns wherever it comes from: logits
// in memory, or products just computed. Its greatest value and its sum of exponentials are taken in one order, panels
// are added in order at the end, and what is counted or selected does not depend on the order at all.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "parallel.h"
#include "vectors.h"

namespace {

constexpr int64_t kPanel = 1024;
constexpr int32_t kNoId = std::numeric_limits<int32_t>::max();

// What is asked of a call, and where the answers go.
struct Numbers {
  int64_t rows, vocab, k, named;  // R, V, K, B
  const int32_t* ids;             // [R]
  const int32_t* named_ids;       // [R, B], then kNoId
  float* logprob;                 // [R]
  int32_t* rank;                  // [R]
  int32_t* top_ids;               // [R, K]
  float* top_logprobs;            // [R, K]
  float* named_logprobs;          // [R, B]
  int32_t* named_ranks;           // [R, B]
  float* normalizer;              // [R]
};

struct Candidate {
  float value;
  int32_t id;
  bool operator<(const Candidate& other) const {  // what comes first in a stable sort: the two zeros are equal
    return value > other.value || (value == other.value && id < other.id);
  }
};

// A token whose rank is asked for.
struct Token {
  int32_t id;
  float own;
  std::atomic<int32_t> ahead{0};
};

struct Row {
  std::vector<Token> tokens;                                          // the row's own, then those that it names
  std::vector<float> best, total;                                     // of each panel
  std::atomic<float> floor{-std::numeric_limits<float>::infinity()};  // what is below is not among the top k
  std::vector<Candidate> candidates;                                  // under the lock
};

// What the threads of one call gather.
class Tally {
 public:
  explicit Tally(const Numbers& asked)
      : numbers(asked), panels((asked.vocab + kPanel - 1) / kPanel), rows(static_cast<size_t>(asked.rows)) {
    for (int64_t r = 0; r < asked.rows; ++r) {
      Row& row = rows[static_cast<size_t>(r)];
      int64_t count = 1;
      while (count <= asked.named && asked.named_ids[r * asked.named + count - 1] != kNoId) ++count;
      row.tokens = std::vector<Token>(static_cast<size_t>(count));
      for (int64_t i = 0; i < count; ++i) {
        const int32_t id = i == 0 ? asked.ids[r] : asked.named_ids[r * asked.named + i - 1];
        row.tokens[static_cast<size_t>(i)].id = std::clamp<int32_t>(id, 0, static_cast<int32_t>(asked.vocab - 1));
      }
      row.best.resize(static_cast<size_t>(panels));
      row.total.resize(static_cast<size_t>(panels));
    }
  }

  const Numbers numbers;
  const int64_t panels;
  std::vector<Row> rows;
  std::mutex lock;
};

// The best k that one claim has seen of a row, best first.
class Best {
 public:
  explicit Best(int64_t k) : k_(static_cast<size_t>(k)) { kept_.reserve(k_ + 1); }

  bool full() const { return kept_.size() == k_; }
  // The least that is kept, once there are k. Ids come in ascending order, so what only equals it stays out.
  float least() const { return k_ == 0 ? std::numeric_limits<float>::infinity() : kept_.back().value; }

  void Offer(Candidate newcomer) {
    kept_.insert(std::upper_bound(kept_.begin(), kept_.end(), newcomer), newcomer);
    if (kept_.size() > k_) kept_.pop_back();
  }

  const std::vector<Candidate>& kept() const { return kept_; }

 private:
  const size_t k_;
  std::vector<Candidate> kept_;
};

// A part of a panel, and -inf after its end.
INLINE Floats LoadPanel(const float* logits, int64_t at, int64_t count) {
  return KeepFirst(LoadSome(logits + at, count - at), count - at, -std::numeric_limits<float>::infinity());
}

// Lanes that may be among the top k: none that another claim's k surpass, none that this claim's k reach.
INLINE uint32_t MayBeBest(Floats x, uint32_t there, Floats below, const Best& best) {
  const uint32_t found = there & Bits(NotLess(x, below));
  return best.full() ? found & Bits(Greater(x, Fill(best.least()))) : found;
}

// Offers what may be among the top k of a row, and gives the panel's greatest value.
float Select(const float* logits, int64_t count, int64_t first_id, float below, Best& best) {
  const Floats floor = Fill(below);
  Floats top = Fill(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats x = LoadPanel(logits, i, count);
    top = Max(top, x);
    for (uint32_t found = MayBeBest(x, Bits(FirstLanes(count - i)), floor, best); found != 0; found &= found - 1) {
      const int64_t at = i + __builtin_ctz(found);
      best.Offer({logits[at], static_cast<int32_t>(first_id + at)});
    }
  }
  return MaxOf(top);
}

float SumOfExponentials(const float* logits, int64_t count, float best) {
  // Of -inf alone the sum is 0, and a NaN among them stays one.
  const Floats shift = Fill(best == -std::numeric_limits<float>::infinity() ? 0.0f : best);
  Floats sum = Zeros();
  for (int64_t i = 0; i < count; i += kLanes) {
    sum = Add(sum, ExpOfNegative(Sub(LoadPanel(logits, i, count), shift)));  // past the end: exp(-inf) = 0
  }
  return SumOf(sum);
}

// How many of a panel come before a token: greater, or equal with a lower id.
int32_t Ahead(const float* logits, int64_t count, int64_t first_id, const Token& token) {
  const Floats own = Fill(token.own);
  const int64_t lower = token.id - first_id;  // columns before it have lower ids
  int32_t ahead = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats x = LoadPanel(logits, i, count);
    const uint32_t greater = Bits(FirstLanes(count - i)) & Bits(Greater(x, own));
    const uint32_t equal = Bits(FirstLanes(std::min(count, lower) - i)) & Bits(Equal(x, own));
    ahead += __builtin_popcount(greater | equal);
  }
  return ahead;
}

// Takes one panel of a row into account.
inline void Take(Row& row, int64_t panel, const float* logits, int64_t count, Best& best) {
  const int64_t first_id = panel * kPanel;
  const float top = Select(logits, count, first_id, row.floor.load(std::memory_order_relaxed), best);
  if (best.full()) {
    const float mine = best.least();
    float known = row.floor.load(std::memory_order_relaxed);
    while (known < mine && !row.floor.compare_exchange_weak(known, mine, std::memory_order_relaxed)) {
    }
  }
  row.best[static_cast<size_t>(panel)] = top;
  row.total[static_cast<size_t>(panel)] = SumOfExponentials(logits, count, top);
  for (Token& token : row.tokens) {
    token.ahead.fetch_add(Ahead(logits, count, first_id, token), std::memory_order_relaxed);
  }
}

// log(sum(exp(logits))) of a row from its panels, in order. Infinite or no numbers give NaN.
inline float Normalizer(const Row& row) {
  const float best = *std::max_element(row.best.begin(), row.best.end());
  const auto panels = static_cast<int64_t>(row.best.size());
  Floats sum = Zeros();
  for (int64_t i = 0; i < panels; i += kLanes) {
    const Floats scale = ExpOfNegative(Sub(LoadPanel(row.best.data(), i, panels), Fill(best)));
    const Floats total = LoadSome(row.total.data() + i, panels - i);
    sum = Choose(FirstLanes(panels - i), Fma(total, scale, sum), sum);
  }
  return best + std::log(SumOf(sum));
}

// The answers for row r, once all panels are in.
inline void Answer(Tally& tally, int64_t r) {
  const Numbers& to = tally.numbers;
  Row& row = tally.rows[static_cast<size_t>(r)];
  const float normalizer = Normalizer(row);
  to.normalizer[r] = normalizer;
  to.logprob[r] = row.tokens[0].own - normalizer;
  to.rank[r] = 1 + row.tokens[0].ahead.load();
  for (int64_t i = 0; i < to.named; ++i) {
    const bool asked = i + 1 < static_cast<int64_t>(row.tokens.size());
    const Token* token = asked ? &row.tokens[static_cast<size_t>(i + 1)] : nullptr;
    to.named_logprobs[r * to.named + i] = asked ? token->own - normalizer : 0.0f;
    to.named_ranks[r * to.named + i] = asked ? 1 + token->ahead.load() : 0;
  }
  const int64_t there = std::min<int64_t>(to.k, static_cast<int64_t>(row.candidates.size()));
  std::partial_sort(row.candidates.begin(), row.candidates.begin() + there, row.candidates.end());
  for (int64_t i = 0; i < to.k; ++i) {  // a row of NaN has fewer candidates than k
    const Candidate none = {std::numeric_limits<float>::quiet_NaN(), 0};
    const Candidate candidate = i < there ? row.candidates[static_cast<size_t>(i)] : none;
    to.top_ids[r * to.k + i] = candidate.id;
    to.top_logprobs[r * to.k + i] = candidate.value - normalizer;
  }
}

constexpr int64_t kMinLogitsToShare = 1 << 15;  // waking a thread takes longer than fewer

// Calls produce(panel, count, take) for every panel, which calls take(row, logits) for every live row, and writes all
// answers. False where memory ran out.
template <typename Pool, typename Produce>
[[nodiscard]] bool Gather(Pool& pool, const std::shared_ptr<Tally>& tally, Produce produce) {
  const Numbers& n = tally->numbers;
  const int64_t most = n.rows * n.vocab < kMinLogitsToShare ? 1 : pool.num_threads();
  const auto range = [tally, produce](int64_t first, int64_t last) {
    const FloatMode mode;
    const Numbers& all = tally->numbers;
    std::vector<Best> best(static_cast<size_t>(all.rows), Best(all.k));
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t count = std::min(kPanel, all.vocab - panel * kPanel);
      produce(panel, count, [&](int64_t r, const float* logits) {
        Take(tally->rows[static_cast<size_t>(r)], panel, logits, count, best[static_cast<size_t>(r)]);
      });
    }
    const std::lock_guard<std::mutex> guard(tally->lock);
    for (size_t r = 0; r < best.size(); ++r) {
      auto& candidates = tally->rows[r].candidates;
      candidates.insert(candidates.end(), best[r].kept().begin(), best[r].kept().end());
    }
  };
  if (!Share(pool, std::max<int64_t>(1, std::min<int64_t>(most, tally->panels)), tally->panels, range)) return false;
  const FloatMode mode;
  for (int64_t r = 0; r < n.rows; ++r) Answer(*tally, r);
  return true;
}

}  // namespace
