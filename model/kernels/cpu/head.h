// The arithmetic of head.cc: log-prob, unique rank and exact top-k of rows of logits, one panel at a time as the panels
// become available, on several threads.
//
// The promise: a row's results depend on its own logits alone. A panel is 1,024 columns wherever it comes from: logits
// in memory, or products just computed. Its maximum and its sum of exponentials are taken in one order, panels are
// added in order at the end, and counts and selections do not depend on the order at all.

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

namespace LOGPROBD_NAMESPACE {

constexpr int64_t kPanel = 1024;
constexpr int32_t kNoId = std::numeric_limits<int32_t>::max();

// Inputs and outputs of one call.
struct TokenLogprobs {
  int64_t rows, vocab, k, requested;  // R, V, K, B
  const int32_t* ids;                 // [R]
  const int32_t* requested_ids;       // [R, B], padded with kNoId
  float* logprob;                     // [R]
  int32_t* rank;                      // [R]
  int32_t* top_ids;                   // [R, K]
  float* top_logprobs;                // [R, K]
  float* requested_logprobs;          // [R, B]
  int32_t* requested_ranks;           // [R, B]
  float* normalizer;                  // [R]
};

struct Candidate {
  float logit;
  int32_t id;
  bool operator<(const Candidate& other) const {  // the order of a stable descending sort; -0 equals +0
    return logit > other.logit || (logit == other.logit && id < other.id);
  }
};

// A token whose log-prob and rank are computed.
struct Token {
  int32_t id;
  float logit;
  std::atomic<int32_t> ahead{0};  // ids counted so far that rank before it
};

struct Row {
  std::vector<Token> tokens;          // the row's own token, then its requested ids
  std::vector<float> maxima, totals;  // of each panel: the largest logit, the sum of exponentials
  std::atomic<float> threshold{-std::numeric_limits<float>::infinity()};  // logits below it are not in the top k
  std::vector<Candidate> candidates;                                      // guarded by Accumulator::lock
};

// State that the threads of one call share.
class Accumulator {
 public:
  explicit Accumulator(const TokenLogprobs& call)
      : call(call), panels((call.vocab + kPanel - 1) / kPanel), rows(static_cast<size_t>(call.rows)) {
    for (int64_t r = 0; r < call.rows; ++r) {
      Row& row = rows[static_cast<size_t>(r)];
      const int32_t* requested_ids = call.requested_ids + r * call.requested;
      int64_t count = 1;
      while (count <= call.requested && requested_ids[count - 1] != kNoId) ++count;
      row.tokens = std::vector<Token>(static_cast<size_t>(count));
      for (int64_t i = 0; i < count; ++i) {
        const int32_t id = i == 0 ? call.ids[r] : requested_ids[i - 1];
        row.tokens[static_cast<size_t>(i)].id = std::clamp<int32_t>(id, 0, static_cast<int32_t>(call.vocab - 1));
      }
      row.maxima.resize(static_cast<size_t>(panels));
      row.totals.resize(static_cast<size_t>(panels));
    }
  }

  const TokenLogprobs call;
  const int64_t panels;
  std::vector<Row> rows;
  std::mutex lock;
};

// The k best candidates of a row that one claim has seen, best first.
class TopK {
 public:
  explicit TopK(int64_t k) : k_(static_cast<size_t>(k)) { candidates_.reserve(k_ + 1); }

  bool full() const { return candidates_.size() == k_; }
  // The smallest of k logits. Ids arrive in ascending order, so a logit equal to it does not enter.
  float kth() const { return k_ == 0 ? std::numeric_limits<float>::infinity() : candidates_.back().logit; }

  void Insert(Candidate candidate) {
    candidates_.insert(std::upper_bound(candidates_.begin(), candidates_.end(), candidate), candidate);
    if (candidates_.size() > k_) candidates_.pop_back();
  }

  const std::vector<Candidate>& candidates() const { return candidates_; }

 private:
  const size_t k_;
  std::vector<Candidate> candidates_;
};

// 16 logits of a panel, -inf after its end.
LOGPROBD_INLINE Floats LoadPanel(const float* logits, int64_t start, int64_t count) {
  return KeepFirst(LoadSome(logits + start, count - start), count - start, -std::numeric_limits<float>::infinity());
}

// Lanes that may be among the top k: at least `threshold`, and above this claim's k-th candidate.
LOGPROBD_INLINE uint32_t CandidateLanes(Floats x, uint32_t valid, Floats threshold, const TopK& top) {
  const uint32_t lanes = valid & Bits(GreaterOrEqual(x, threshold));
  return top.full() ? lanes & Bits(Greater(x, Fill(top.kth()))) : lanes;
}

// Inserts the panel's candidates into `top` and returns the panel's largest logit.
inline float SelectTopK(const float* logits, int64_t count, int64_t first_id, float threshold, TopK& top) {
  const Floats thresholds = Fill(threshold);
  Floats largest = Fill(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats x = LoadPanel(logits, i, count);
    largest = Max(largest, x);
    for (uint32_t lanes = CandidateLanes(x, Bits(FirstLanes(count - i)), thresholds, top); lanes != 0;
         lanes &= lanes - 1) {
      const int64_t column = i + __builtin_ctz(lanes);
      top.Insert({logits[column], static_cast<int32_t>(first_id + column)});
    }
  }
  return MaxOf(largest);
}

inline float SumOfExponentials(const float* logits, int64_t count, float best) {
  // Of -inf alone the sum is 0, and a NaN among them stays one.
  const Floats shift = Fill(best == -std::numeric_limits<float>::infinity() ? 0.0f : best);
  Floats sum = Zeros();
  for (int64_t i = 0; i < count; i += kLanes) {
    sum = Add(sum, ExpOfNegative(Sub(LoadPanel(logits, i, count), shift)));  // past the end: exp(-inf) = 0
  }
  return SumOf(sum);
}

// Ids of a panel that rank before a token: a larger logit, or an equal one with a lower id.
inline int32_t CountAhead(const float* logits, int64_t count, int64_t first_id, const Token& token) {
  const Floats logit = Fill(token.logit);
  const int64_t lower = token.id - first_id;  // columns before it have lower ids
  int32_t ahead = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats x = LoadPanel(logits, i, count);
    const uint32_t greater = Bits(FirstLanes(count - i)) & Bits(Greater(x, logit));
    const uint32_t equal = Bits(FirstLanes(std::min(count, lower) - i)) & Bits(Equal(x, logit));
    ahead += __builtin_popcount(greater | equal);
  }
  return ahead;
}

// 1 + #(logit > x) + #(logit == x and lower id), once all panels are accumulated.
inline int32_t Rank(const Token& token) { return 1 + token.ahead.load(); }

// Adds one panel of a row to the row's maxima, totals, top k and counts.
inline void AccumulatePanel(Row& row, int64_t panel, const float* logits, int64_t count, TopK& top) {
  const int64_t first_id = panel * kPanel;
  const float largest = SelectTopK(logits, count, first_id, row.threshold.load(std::memory_order_relaxed), top);
  if (top.full()) {
    const float kth = top.kth();
    float threshold = row.threshold.load(std::memory_order_relaxed);
    while (threshold < kth && !row.threshold.compare_exchange_weak(threshold, kth, std::memory_order_relaxed)) {
    }
  }
  row.maxima[static_cast<size_t>(panel)] = largest;
  row.totals[static_cast<size_t>(panel)] = SumOfExponentials(logits, count, largest);
  for (Token& token : row.tokens) {
    token.ahead.fetch_add(CountAhead(logits, count, first_id, token), std::memory_order_relaxed);
  }
}

// log(sum(exp(logits))) of a row from its panels, in order. NaN if a logit is NaN or +inf, or all are -inf.
inline float Normalizer(const Row& row) {
  const float largest = *std::max_element(row.maxima.begin(), row.maxima.end());
  const auto panels = static_cast<int64_t>(row.maxima.size());
  Floats sum = Zeros();
  for (int64_t i = 0; i < panels; i += kLanes) {
    const Floats scale = ExpOfNegative(Sub(LoadPanel(row.maxima.data(), i, panels), Fill(largest)));
    const Floats total = LoadSome(row.totals.data() + i, panels - i);
    sum = Choose(FirstLanes(panels - i), Fma(total, scale, sum), sum);
  }
  return largest + std::log(SumOf(sum));
}

// Writes the outputs of row r, once all panels are accumulated.
inline void WriteRow(Accumulator& accumulator, int64_t r) {
  const TokenLogprobs& out = accumulator.call;
  Row& row = accumulator.rows[static_cast<size_t>(r)];
  const float normalizer = Normalizer(row);
  out.normalizer[r] = normalizer;
  out.logprob[r] = row.tokens[0].logit - normalizer;
  out.rank[r] = Rank(row.tokens[0]);
  for (int64_t i = 0; i < out.requested; ++i) {
    const bool is_id = i + 1 < static_cast<int64_t>(row.tokens.size());
    const Token* token = is_id ? &row.tokens[static_cast<size_t>(i + 1)] : nullptr;
    out.requested_logprobs[r * out.requested + i] = is_id ? token->logit - normalizer : 0.0f;
    out.requested_ranks[r * out.requested + i] = is_id ? Rank(*token) : 0;
  }
  const int64_t count = std::min<int64_t>(out.k, static_cast<int64_t>(row.candidates.size()));
  std::partial_sort(row.candidates.begin(), row.candidates.begin() + count, row.candidates.end());
  for (int64_t i = 0; i < out.k; ++i) {  // a row of NaN has fewer candidates than k
    const Candidate missing = {std::numeric_limits<float>::quiet_NaN(), 0};
    const Candidate candidate = i < count ? row.candidates[static_cast<size_t>(i)] : missing;
    out.top_ids[r * out.k + i] = candidate.id;
    out.top_logprobs[r * out.k + i] = candidate.logit - normalizer;
  }
}

constexpr int64_t kMinLogitsToShare = 1 << 15;  // fewer logits take less time than waking a thread

// Calls produce(panel, count, accumulate) for every panel, which calls accumulate(row, logits) for every live row; then
// writes the outputs of all rows. Returns false if memory ran out.
template <typename Pool, typename Produce>
[[nodiscard]] bool ComputeTokenLogprobs(Pool& pool, const std::shared_ptr<Accumulator>& accumulator, Produce produce) {
  const int64_t rows = accumulator->call.rows, panels = accumulator->panels;
  const int64_t threads = rows * accumulator->call.vocab < kMinLogitsToShare ? 1 : pool.num_threads();
  const auto range = [accumulator, produce](int64_t first, int64_t last) {
    const FloatMode mode;
    const TokenLogprobs& call = accumulator->call;
    std::vector<TopK> top(static_cast<size_t>(call.rows), TopK(call.k));
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t count = std::min(kPanel, call.vocab - panel * kPanel);
      produce(panel, count, [&](int64_t r, const float* logits) {
        AccumulatePanel(accumulator->rows[static_cast<size_t>(r)], panel, logits, count, top[static_cast<size_t>(r)]);
      });
    }
    const std::lock_guard<std::mutex> guard(accumulator->lock);
    for (size_t r = 0; r < top.size(); ++r) {
      auto& candidates = accumulator->rows[r].candidates;
      candidates.insert(candidates.end(), top[r].candidates().begin(), top[r].candidates().end());
    }
  };
  if (!Share(pool, std::max<int64_t>(1, std::min<int64_t>(threads, panels)), panels, range)) return false;
  const FloatMode mode;
  for (int64_t r = 0; r < rows; ++r) WriteRow(*accumulator, r);
  return true;
}

}  // namespace LOGPROBD_NAMESPACE
