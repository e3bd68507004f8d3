// The arithmetic of rows.cc: per-token operations of a layer, other than matrix products.
//
// Determinism: a token's result depends only on that token, and each sum runs in one order, so it has the same bits in
// every batch and chunk.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

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

// The k largest of `count` logits, the largest first and of equal ones the first, and their shares of the sum of
// exponentials of all logits, or of the chosen ones. With a NaN among the logits all shares are NaN.
inline void ChooseExperts(const float* logits, int64_t count, int64_t k, bool normalized, float* shares, int32_t* ids) {
  int64_t found = 0;
  bool is_number = true;
  for (int64_t i = 0; i < count; ++i) {
    is_number = is_number && logits[i] == logits[i];
    int64_t at = found;
    while (at > 0 && logits[i] > logits[ids[at - 1]]) --at;
    if (at == k) continue;
    found = std::min(found + 1, k);
    std::copy_backward(ids + at, ids + found - 1, ids + found);
    ids[at] = static_cast<int32_t>(i);
  }
  const float best = logits[ids[0]];
  for (int64_t i = 0; i < k; ++i) shares[i] = logits[ids[i]];
  const auto exponentials = [best](const float* from, int64_t left) {
    alignas(64) float some[kLanes];
    std::fill_n(some, kLanes, -std::numeric_limits<float>::infinity());
    std::copy_n(from, std::min<int64_t>(left, kLanes), some);
    return ExpOfNegative(Sub(Load(some), Fill(best)));
  };
  const float* summed = normalized ? shares : logits;
  Floats sum = Zeros();
  for (int64_t i = 0; i < (normalized ? k : count); i += kLanes) {
    sum = Add(sum, exponentials(summed + i, (normalized ? k : count) - i));
  }
  const Floats total = Fill(is_number ? SumOf(sum) : std::numeric_limits<float>::quiet_NaN());
  for (int64_t i = 0; i < k; i += kLanes) StoreSome(shares + i, k - i, Div(exponentials(shares + i, k - i), total));
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
