// Vectors of 16 floats or 32-bit integers, in the registers of the target CPU, and conversions from and to bfloat16.
//
// Each of the files below implements the same operations with the same results, to the last bit: each rounds once, to
// nearest even, and denormals are zeros (FloatMode). So code written with them has the same result on all CPUs.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

// A namespace per instruction set: one process may load libraries for several of them, which must share no symbol.
#if defined(__AVX512F__)
#define LOGPROBD_NAMESPACE logprobd::avx512
#elif defined(__AVX2__)
#define LOGPROBD_NAMESPACE logprobd::avx2
#else
#define LOGPROBD_NAMESPACE logprobd::neon
#endif
#define LOGPROBD_INLINE __attribute__((always_inline)) inline

namespace LOGPROBD_NAMESPACE {

constexpr int64_t kLanes = 16;  // floats of a vector

inline float ToFloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

}  // namespace LOGPROBD_NAMESPACE

#if defined(__AVX512F__)
#include "vectors_avx512.h"
#elif defined(__AVX2__)
#include "vectors_avx2.h"
#elif defined(__aarch64__)
#include "vectors_neon.h"
#else
#error "the kernels are for AVX-512, AVX2 and NEON"
#endif

namespace LOGPROBD_NAMESPACE {

LOGPROBD_INLINE void Store(float* to, Floats value) { StoreSome(to, kLanes, value); }

// x with the lanes from `count` on replaced.
LOGPROBD_INLINE Floats KeepFirst(Floats x, int64_t count, float others) {
  return Choose(FirstLanes(count), x, Fill(others));
}

// exp(x) for x <= 0: 2^n e^r, |r| <= ln(2) / 2, e^r by its Taylor series to r^7, whose remainder is below 6e-9.
LOGPROBD_INLINE Floats ExpOfNegative(Floats x) {
  const Floats n = Round(Mul(x, Fill(1.44269504f)));
  Floats r = NegatedFma(n, Fill(0.693359375f), x);  // ln(2) in two parts, the first exact in 10 bits
  r = NegatedFma(n, Fill(-2.12194440e-4f), r);
  Floats e = Fill(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) e = Fma(e, r, Fill(term));
  return Choose(Less(x, Fill(-87.0f)), Zeros(), TimesPowerOfTwo(e, n));  // the comparison is false for NaN, which stays
}

// 1 / (1 + exp(-x)), by exp(-|x|), which never overflows.
LOGPROBD_INLINE Floats Sigmoid(Floats x) {
  const Floats one = Fill(1.0f), e = ExpOfNegative(Sub(Zeros(), Abs(x)));
  return Div(Choose(Less(x, Zeros()), e, one), Add(one, e));
}

// tanh(x): its Taylor series to x^11 below 1/4, where 1 - exp(-2|x|) would lose digits, and that form above.
LOGPROBD_INLINE Floats Tanh(Floats x) {
  const Floats size = Abs(x), one = Fill(1.0f), square = Mul(x, x);
  Floats series = Fill(-1382.0f / 155925);
  for (const float term : {62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3}) series = Fma(series, square, Fill(term));
  const Floats small = Fma(Mul(series, square), x, x);
  const Floats e = ExpOfNegative(Mul(size, Fill(-2.0f))), large = Div(Sub(one, e), Add(one, e));
  return Choose(Less(size, Fill(0.25f)), small, Choose(Less(x, Zeros()), Sub(Zeros(), large), large));
}

// cap * tanh(x / cap): bounds scores and logits (Gemma 2).
LOGPROBD_INLINE Floats SoftCap(Floats x, Floats cap) { return Mul(cap, Tanh(Div(x, cap))); }

}  // namespace LOGPROBD_NAMESPACE
