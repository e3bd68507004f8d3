// The arithmetic of rows.cc: what a layer does to one token at a time, between its products.
//
// The promise: a token's result depends on that token alone, and each sum runs in one order, so it has the same bits in
// every batch and chunk.

#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace {

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

// y = gate / (1 + exp(-gate)) * up, by e = exp(-|gate|), which never overflows.
template <typename Element>
void SwigluRow(const float* gate, const float* up, int64_t size, Element* y) {
  const Floats one = Fill(1.0f);
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats g = LoadSome(gate + i, size - i);
    const Floats e = ExpOfNegative(Sub(Zeros(), Abs(g)));
    const Floats sigmoid = Div(Choose(Less(g, Zeros()), e, one), Add(one, e));
    StoreSome(y + i, size - i, Mul(Mul(g, sigmoid), LoadSome(up + i, size - i)));
  }
}

// Turns the pairs (i, i + half) of one head by its token's angles.
template <typename Element>
void RotateHead(const float* x, const float* cos, const float* sin, int64_t half, Element* y) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const Floats a = LoadSome(x + i, half - i), b = LoadSome(x + half + i, half - i);
    const Floats c = LoadSome(cos + i, half - i), s = LoadSome(sin + i, half - i);
    StoreSome(y + i, half - i, NegatedFma(b, s, Mul(a, c)));
    StoreSome(y + half + i, half - i, Fma(b, c, Mul(a, s)));
  }
}

template <typename Element>
void CopyHead(const float* x, int64_t size, Element* y) {
  for (int64_t i = 0; i < size; i += kLanes) StoreSome(y + i, size - i, LoadSome(x + i, size - i));
}

}  // namespace
