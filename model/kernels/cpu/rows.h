// The arithmetic of rows.cc: what a layer does to one token at a time, between its products.
//
// The promise: a token's result depends on that token alone, and each sum runs in one order, so it has the same bits in
// every batch and chunk.

#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

#if defined(__x86_64__)

namespace {

AVX512_INLINE void StoreFloats(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
AVX512_INLINE void StoreFloats(uint16_t* to, __mmask16 mask, __m512 value) { StoreBf16(to, mask, value); }

// y = x / sqrt(mean(x^2) + epsilon) * weight. Sixteen sums, each over every sixteenth element, then their sum.
template <typename Element>
AVX512 void NormRow(const float* x, const float* weight, float epsilon, int64_t size, Element* y) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += kLanes) {
    const __m512 part = LoadFloats(x + i, FirstLanes(size - i));
    squares = _mm512_fmadd_ps(part, part, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(size);
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean + epsilon));
  for (int64_t i = 0; i < size; i += kLanes) {
    const __mmask16 there = FirstLanes(size - i);
    const __m512 scaled = _mm512_mul_ps(LoadFloats(x + i, there), scale);
    StoreFloats(y + i, there, _mm512_mul_ps(scaled, LoadFloats(weight + i, there)));
  }
}

// y = gate / (1 + exp(-gate)) * up, by e = exp(-|gate|), which never overflows.
template <typename Element>
AVX512 void SwigluRow(const float* gate, const float* up, int64_t size, Element* y) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < size; i += kLanes) {
    const __mmask16 there = FirstLanes(size - i);
    const __m512 g = LoadFloats(gate + i, there);
    const __m512 e = ExpOfNegative(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(g)));
    const __mmask16 negative = _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 sigmoid = _mm512_div_ps(_mm512_mask_mov_ps(one, negative, e), _mm512_add_ps(one, e));
    StoreFloats(y + i, there, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid), LoadFloats(up + i, there)));
  }
}

// Turns the pairs (i, i + half) of one head by its token's angles.
template <typename Element>
AVX512 void RotateHead(const float* x, const float* cos, const float* sin, int64_t half, Element* y) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const __mmask16 there = FirstLanes(half - i);
    const __m512 a = LoadFloats(x + i, there), b = LoadFloats(x + half + i, there);
    const __m512 c = LoadFloats(cos + i, there), s = LoadFloats(sin + i, there);
    StoreFloats(y + i, there, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    StoreFloats(y + half + i, there, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
  }
}

template <typename Element>
AVX512 void CopyHead(const float* x, int64_t size, Element* y) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const __mmask16 there = FirstLanes(size - i);
    StoreFloats(y + i, there, LoadFloats(x + i, there));
  }
}

}  // namespace

#endif
