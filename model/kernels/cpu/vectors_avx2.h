// The operations of vectors.h in two AVX2 registers, with FMA and F16C, which all CPUs with AVX2 have.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "x86.h"

namespace LOGPROBD_NAMESPACE {

constexpr int kTileRows = 5;     // of the linear map: 10 accumulators of 16 registers
constexpr int kWideRows = 2;     // largest tile of 32 columns; larger ones take 16 at a time
constexpr int kTileVectors = 1;  // of attention, with 6 rows

struct Floats {
  __m256 low, high;
};
struct Mask {
  __m256 low, high;  // all bits of a lane set, or none
};

inline bool RunsHere() { return HasAvx2(); }

LOGPROBD_INLINE Floats Zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
LOGPROBD_INLINE Floats Fill(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
LOGPROBD_INLINE Floats Add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
LOGPROBD_INLINE Floats Sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
LOGPROBD_INLINE Floats Mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
LOGPROBD_INLINE Floats Div(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
LOGPROBD_INLINE Floats Fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
LOGPROBD_INLINE Floats NegatedFma(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
LOGPROBD_INLINE Floats Max(Floats a, Floats b) {  // a > b ? a : b
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
LOGPROBD_INLINE Floats Abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
LOGPROBD_INLINE Floats Round(Floats a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
}
// a * 2^n for integer n from -126 to 127.
LOGPROBD_INLINE __m256 PowerOfTwo(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
LOGPROBD_INLINE Floats TimesPowerOfTwo(Floats a, Floats n) { return Mul(a, {PowerOfTwo(n.low), PowerOfTwo(n.high)}); }

LOGPROBD_INLINE Mask FirstLanes(int64_t count) {
  const __m256i limit = _mm256_set1_epi32(static_cast<int>(std::clamp<int64_t>(count, 0, 16)));
  const __m256i low = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), high = _mm256_set_epi32(15, 14, 13, 12, 11, 10, 9, 8);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, low)), _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, high))};
}
template <int kComparison>
LOGPROBD_INLINE Mask Compare(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.low, b.low, kComparison), _mm256_cmp_ps(a.high, b.high, kComparison)};
}
LOGPROBD_INLINE Mask Less(Floats a, Floats b) { return Compare<_CMP_LT_OQ>(a, b); }
LOGPROBD_INLINE Mask Greater(Floats a, Floats b) { return Compare<_CMP_GT_OQ>(a, b); }
LOGPROBD_INLINE Mask GreaterOrEqual(Floats a, Floats b) { return Compare<_CMP_GE_OQ>(a, b); }
LOGPROBD_INLINE Mask Equal(Floats a, Floats b) { return Compare<_CMP_EQ_OQ>(a, b); }
LOGPROBD_INLINE uint32_t Bits(Mask mask) {
  return static_cast<uint32_t>(_mm256_movemask_ps(mask.low)) | static_cast<uint32_t>(_mm256_movemask_ps(mask.high))
                                                                   << 8;
}
LOGPROBD_INLINE Floats Choose(Mask mask, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.low, yes.low, mask.low), _mm256_blendv_ps(no.high, yes.high, mask.high)};
}

LOGPROBD_INLINE __m256 FromBf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
LOGPROBD_INLINE __m256i ToBf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value), top = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(even, 16), quiet, nan);
}

LOGPROBD_INLINE Floats Load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
LOGPROBD_INLINE Floats Load(const uint16_t* from) {
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  return {FromBf16(_mm_loadu_si128(halves)), FromBf16(_mm_loadu_si128(halves + 1))};
}
LOGPROBD_INLINE void StoreAll(float* to, Floats value) {
  _mm256_storeu_ps(to, value.low);
  _mm256_storeu_ps(to + 8, value.high);
}
LOGPROBD_INLINE void StoreAll(uint16_t* to, Floats value) {
  const __m256i mixed = _mm256_packus_epi32(ToBf16(value.low), ToBf16(value.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(mixed, 0xd8));
}

LOGPROBD_INLINE Floats LoadInt8(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
LOGPROBD_INLINE Floats LoadFloat16(const uint16_t* from) {
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}

// 16 pairs of bfloat16: the first of each, and the second.
struct Pairs {
  Floats first, second;
};
LOGPROBD_INLINE Pairs LoadPairs(const uint16_t* from) {
  const auto* halves = reinterpret_cast<const __m256i*>(from);
  const __m256i low = _mm256_loadu_si256(halves), high = _mm256_loadu_si256(halves + 1);
  const __m256i top = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(low, top)), _mm256_castsi256_ps(_mm256_and_si256(high, top))}};
}

// Lanes i and i + 8 first.
LOGPROBD_INLINE float SumOf(Floats x) { return SumOf(_mm256_add_ps(x.high, x.low)); }
LOGPROBD_INLINE float MaxOf(Floats x) { return MaxOf(_mm256_max_ps(x.high, x.low)); }

}  // namespace LOGPROBD_NAMESPACE

#include "vectors_parts.h"
