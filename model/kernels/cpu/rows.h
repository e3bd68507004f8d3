// The arithmetic of rows.cc: per-token operations of a layer, other than matrix products.
//
// Determinism: a token's result depends only on that token, and each sum runs in one order, so it has the same bits in
// every batch and chunk.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "vectors.h"

namespace LOGPROBD_NAMESPACE {

// y = x / sqrt(mean(x^2) + epsilon) * weight. Sixteen sums, each over every sixteenth element, then their sum.
template <typename Element>
void NormRow(const float* x, const float* weight, float epsilon, int64_t size, Element* y) {
  Floats squares = Zeros();
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats part = LoadSome(x + i, size - i);
    squares = Fma(part, part, squares);
  }
  const float mean = SumOf(squares) / static_cast<float>(size);
  const Floats scale = Fill(1.0f / std::sqrt(mean + epsilon));
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats scaled = Mul(LoadSome(x + i, size - i), scale);
    StoreSome(y + i, size - i, Mul(scaled, LoadSome(weight + i, size - i)));
  }
}

// y = gate * sigmoid(gate) * up.
template <typename Element>
void SwigluRow(const float* gate, const float* up, int64_t size, Element* y) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats g = LoadSome(gate + i, size - i);
    StoreSome(y + i, size - i, Mul(Mul(g, Sigmoid(g)), LoadSome(up + i, size - i)));
  }
}

// y = gelu(gate) * up by the approximation with tanh, where (1 + tanh(u)) / 2 = sigmoid(2 u).
template <typename Element>
void GegluRow(const float* gate, const float* up, int64_t size, Element* y) {
  const Floats linear = Fill(1.5957691216f), cubic = Fill(0.044715f * 1.5957691216f);  // 2 sqrt(2 / pi)
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats g = LoadSome(gate + i, size - i);
    const Floats u = Mul(g, Fma(Mul(g, g), cubic, linear));
    StoreSome(y + i, size - i, Mul(Mul(g, Sigmoid(u)), LoadSome(up + i, size - i)));
  }
}

// y = gate * sigmoid(1.702 gate) * (up + 1) with gate up to 7 and up from -7 to 7 (gpt-oss). NaN stays.
template <typename Element>
void ClampedSwigluRow(const float* gate, const float* up, int64_t size, Element* y) {
  const Floats low = Fill(-7.0f), slope = Fill(1.702f), one = Fill(1.0f);
  const auto negative = [](Floats x) { return Sub(Zeros(), x); };
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats g = negative(Max(low, negative(LoadSome(gate + i, size - i))));
    const Floats u = Max(low, negative(Max(low, negative(LoadSome(up + i, size - i)))));
    StoreSome(y + i, size - i, Mul(Mul(g, Sigmoid(Mul(g, slope))), Add(u, one)));
  }
}

// y = cap * tanh(x / cap).
inline void SoftCapRow(const float* x, float cap, int64_t size, float* y) {
  const Floats bound = Fill(cap);
  for (int64_t i = 0; i < size; i += kLanes) StoreSome(y + i, size - i, SoftCap(LoadSome(x + i, size - i), bound));
}

// Rotates the pairs (i, i + half) of one head by its token's angles.
template <typename Element>
void RotateHead(const float* x, const float* cos, const float* sin, int64_t half, Element* y) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const Floats a = LoadSome(x + i, half - i), b = LoadSome(x + half + i, half - i);
    const Floats c = LoadSome(cos + i, half - i), s = LoadSome(sin + i, half - i);
    StoreSome(y + i, half - i, NegatedFma(b, s, Mul(a, c)));
    StoreSome(y + half + i, half - i, Fma(b, c, Mul(a, s)));
  }
}

struct Router {
  int64_t count, k;      // experts, and those of a token
  int64_t groups, open;  // consecutive experts are a group: a token is routed to experts of its `open` best groups
  bool sigmoid;          // scores are sigmoids of the logits, not their softmax
  bool normalized;       // weights are divided by their sum
  float scale;           // of the weights
  const float* bias;     // [count] added to sigmoids, for the choice only
};

// The places of the k largest of `count` keys, the largest first and of equal ones the first.
inline void FindLargest(const float* keys, int64_t count, int64_t k, int32_t* places) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    int64_t at = found;
    while (at > 0 && keys[i] > keys[places[at - 1]]) --at;
    if (at == k) continue;
    found = std::min(found + 1, k);
    std::copy_backward(places + at, places + found - 1, places + found);
    places[at] = static_cast<int32_t>(i);
  }
}

// Makes the keys of experts in closed groups -inf. A group is as good as its best logit, or its two best sigmoids.
inline void CloseGroups(const Router& router, float* keys) {
  const int64_t size = router.count / router.groups, taken = router.sigmoid ? 2 : 1;
  std::vector<float> values(router.groups);
  std::vector<int32_t> best(router.groups);
  for (int64_t group = 0; group < router.groups; ++group) {
    int32_t top[2];
    FindLargest(keys + group * size, size, taken, top);
    values[group] = keys[group * size + top[0]] + (router.sigmoid ? keys[group * size + top[1]] : 0.0f);
  }
  FindLargest(values.data(), router.groups, router.groups, best.data());
  for (int64_t i = router.open; i < router.groups; ++i) {
    std::fill_n(keys + best[i] * size, size, -std::numeric_limits<float>::infinity());
  }
}

// The experts of a token and their weights, the best first and of equal ones the first. With a NaN among the logits all
// weights are NaN.
inline void ChooseExperts(const float* logits, const Router& router, float* weights, int32_t* ids) {
  const int64_t count = router.count, k = router.k;
  std::vector<float> scores, keys;
  if (router.sigmoid) {
    scores.resize(count);
    keys.resize(count);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats score = Sigmoid(LoadSome(logits + i, count - i));
      StoreSome(scores.data() + i, count - i, score);
      StoreSome(keys.data() + i, count - i, Add(score, LoadSome(router.bias + i, count - i)));
    }
  } else if (router.open < router.groups) {
    keys.assign(logits, logits + count);
  }
  if (router.open < router.groups) CloseGroups(router, keys.data());
  FindLargest(keys.empty() ? logits : keys.data(), count, k, ids);
  const bool is_number = std::all_of(logits, logits + count, [](float logit) { return logit == logit; });
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (router.sigmoid) {
    float sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += weights[i] = scores[ids[i]];
    const float total = !is_number ? nan : router.normalized ? sum + 1e-20f : 1.0f;
    for (int64_t i = 0; i < k; ++i) weights[i] = weights[i] / total * router.scale;
    return;
  }
  const float best = logits[ids[0]];
  for (int64_t i = 0; i < k; ++i) weights[i] = logits[ids[i]];
  const auto exponentials = [best](const float* from, int64_t left) {
    alignas(64) float some[kLanes];
    std::fill_n(some, kLanes, -std::numeric_limits<float>::infinity());
    std::copy_n(from, std::min<int64_t>(left, kLanes), some);
    return ExpOfNegative(Sub(Load(some), Fill(best)));
  };
  const float* summed = router.normalized ? weights : logits;
  const int64_t terms = router.normalized ? k : count;
  Floats sum = Zeros();
  for (int64_t i = 0; i < terms; i += kLanes) sum = Add(sum, exponentials(summed + i, terms - i));
  const Floats total = Fill(is_number ? SumOf(sum) : nan), scale = Fill(router.scale);
  for (int64_t i = 0; i < k; i += kLanes) {
    StoreSome(weights + i, k - i, Mul(Div(exponentials(weights + i, k - i), total), scale));
  }
}

// y = the sum of k rows of x, times their weights, in order.
inline void CombineRow(const float* x, const int32_t* rows, const float* weights, int64_t k, int64_t size, float* y) {
  for (int64_t i = 0; i < size; i += kLanes) {
    Floats sum = Zeros();
    for (int64_t j = 0; j < k; ++j) sum = Fma(LoadSome(x + rows[j] * size + i, size - i), Fill(weights[j]), sum);
    StoreSome(y + i, size - i, sum);
  }
}

template <typename Element>
void CopyHead(const float* x, int64_t size, Element* y) {
  for (int64_t i = 0; i < size; i += kLanes) StoreSome(y + i, size - i, LoadSome(x + i, size - i));
}

}  // namespace LOGPROBD_NAMESPACE
