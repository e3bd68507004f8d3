// The operations of vectors.h in one AVX-512 register.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "x86.h"

namespace LOGPROBD_NAMESPACE {

constexpr int kTileRows = 12;    // of the linear map: 24 accumulators of 32 registers
constexpr int kTileColumns = 2;  // vectors of W in a tile
constexpr int kTileVectors = 4;  // of attention, with 6 rows

using Floats = __m512;
using Mask = __mmask16;

constexpr bool HasByteDots() { return true; }  // or this instruction set has one way
inline bool RunsHere() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

LOGPROBD_INLINE Floats Zeros() { return _mm512_setzero_ps(); }
LOGPROBD_INLINE Floats Fill(float value) { return _mm512_set1_ps(value); }
LOGPROBD_INLINE Floats Add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
LOGPROBD_INLINE Floats Sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
LOGPROBD_INLINE Floats Mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
LOGPROBD_INLINE Floats Div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
LOGPROBD_INLINE Floats Fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
LOGPROBD_INLINE Floats NegatedFma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
LOGPROBD_INLINE Floats Max(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // a > b ? a : b
LOGPROBD_INLINE Floats Abs(Floats a) { return _mm512_abs_ps(a); }
LOGPROBD_INLINE Floats Round(Floats a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
LOGPROBD_INLINE Floats TimesPowerOfTwo(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }

LOGPROBD_INLINE Mask FirstLanes(int64_t count) {
  return static_cast<Mask>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}
LOGPROBD_INLINE Mask Less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
LOGPROBD_INLINE Mask Greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
LOGPROBD_INLINE Mask GreaterOrEqual(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
LOGPROBD_INLINE Mask Equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
LOGPROBD_INLINE uint32_t Bits(Mask mask) { return mask; }
LOGPROBD_INLINE Floats Choose(Mask mask, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, mask, yes); }

LOGPROBD_INLINE Floats FromBf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
LOGPROBD_INLINE __m256i ToBf16(Floats value) {
  const __m512i bits = _mm512_castps_si512(value), top = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __m512i quiet = _mm512_or_si512(top, _mm512_set1_epi32(0x40));
  const Mask nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(even, 16), nan, quiet));
}

LOGPROBD_INLINE Floats Load(const float* from) { return _mm512_loadu_ps(from); }
LOGPROBD_INLINE Floats Load(const uint16_t* from) {
  return FromBf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
// The first `count` lanes; the others are zeros, and are not read.
LOGPROBD_INLINE Floats LoadSome(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(FirstLanes(count), from);
}
LOGPROBD_INLINE Floats LoadSome(const uint16_t* from, int64_t count) {
  return FromBf16(_mm256_maskz_loadu_epi16(FirstLanes(count), from));
}
LOGPROBD_INLINE void StoreSome(float* to, int64_t count, Floats value) {
  _mm512_mask_storeu_ps(to, FirstLanes(count), value);
}
LOGPROBD_INLINE void StoreSome(uint16_t* to, int64_t count, Floats value) {
  _mm256_mask_storeu_epi16(to, FirstLanes(count), ToBf16(value));
}

LOGPROBD_INLINE Floats LoadFloat16(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// 16 words of 32 bits.
using Words = __m512i;
using UnsignedLanes = uint32_t __attribute__((vector_size(64)));

LOGPROBD_INLINE Words LoadWords(const uint32_t* from) { return _mm512_loadu_si512(from); }
LOGPROBD_INLINE void StoreWords(uint32_t* to, Words value) { _mm512_storeu_si512(to, value); }
LOGPROBD_INLINE Words LoadBytes(const uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
LOGPROBD_INLINE Words ShiftRight(Words a, int64_t bits) {
  return reinterpret_cast<Words>(reinterpret_cast<UnsignedLanes>(a) >> static_cast<uint32_t>(bits));
}
LOGPROBD_INLINE Words ShiftLeft(Words a, int64_t bits) {
  return reinterpret_cast<Words>(reinterpret_cast<UnsignedLanes>(a) << static_cast<uint32_t>(bits));
}
LOGPROBD_INLINE Words ShiftRightSigned(Words a, int bits) { return _mm512_srai_epi32(a, static_cast<unsigned>(bits)); }
LOGPROBD_INLINE Words And(Words a, uint32_t mask) {
  return _mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(mask)));
}
LOGPROBD_INLINE Words Xor(Words a, uint32_t mask) {
  return _mm512_xor_si512(a, _mm512_set1_epi32(static_cast<int>(mask)));
}
LOGPROBD_INLINE Words AddIntegers(Words a, Words b) { return _mm512_add_epi32(a, b); }
LOGPROBD_INLINE Words Or(Words a, Words b) { return _mm512_or_si512(a, b); }
// table[byte] of each byte, which is below 16.
LOGPROBD_INLINE Words Lookup(Words bytes, const uint8_t (&table)[16]) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), bytes);
}
LOGPROBD_INLINE Floats ToFloats(Words signed_words) { return _mm512_cvtepi32_ps(signed_words); }
LOGPROBD_INLINE Words ToWords(Floats a) { return _mm512_cvtps_epi32(a); }  // to nearest even
LOGPROBD_INLINE Words FillWords(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
LOGPROBD_INLINE void StoreBytes(int8_t* to, Words a) {  // the lowest byte of each word
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a));
}
LOGPROBD_INLINE int32_t SumOfIntegers(Words a) { return _mm512_reduce_add_epi32(a); }
LOGPROBD_INLINE Floats FromBits(Words bits) { return _mm512_castsi512_ps(bits); }
// The low or the high half of each word, a float16.
LOGPROBD_INLINE Floats LowFloat16(Words a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
LOGPROBD_INLINE Floats HighFloat16(Words a) { return LowFloat16(_mm512_srli_epi32(a, 16)); }

LOGPROBD_INLINE Words FillBytes(const int8_t* four) {
  int32_t word;
  std::memcpy(&word, four, sizeof word);
  return _mm512_set1_epi32(word);
}

// Sums of products of the bytes of codes and signed bytes, 4 in each of 16 columns.
constexpr int MaxCodeOfSums(int) { return 255; }
struct ByteSums {
  static constexpr int kTileRows = 8;
  Words sums;

  LOGPROBD_INLINE void Start(int32_t start) { sums = _mm512_set1_epi32(start); }
  template <int>
  LOGPROBD_INLINE void Add(int, Words codes, const int8_t* four) {
    sums = _mm512_dpbusd_epi32(sums, codes, FillBytes(four));
    __asm__("" : "+v"(sums));  // keeps GCC from adding other sums first
  }
  LOGPROBD_INLINE Words Total() const { return sums; }
};

// 16 pairs of bfloat16: the first of each, and the second.
struct Pairs {
  Floats first, second;
};
LOGPROBD_INLINE Pairs Split(__m512i bits) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), _mm512_castsi512_ps(_mm512_and_si512(bits, high))};
}

// Elements e and e + 1 of `count` rows, `stride` elements apart, from `from` = element e of the first; zeros after
// them.
LOGPROBD_INLINE __m512i Offsets(int64_t stride) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(stride)));
}
LOGPROBD_INLINE Pairs GatherPairs(const uint16_t* from, int64_t stride, int64_t count) {
  return Split(_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), FirstLanes(count), Offsets(stride), from, 2));
}
LOGPROBD_INLINE Pairs GatherPairs(const float* from, int64_t stride, int64_t count) {
  const __m512i offsets = Offsets(stride);
  return {_mm512_mask_i32gather_ps(Zeros(), FirstLanes(count), offsets, from, 4),
          _mm512_mask_i32gather_ps(Zeros(), FirstLanes(count), offsets, from + 1, 4)};
}

// Lanes i and i + 8 first.
LOGPROBD_INLINE __m256 High(Floats x) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)); }
LOGPROBD_INLINE float SumOf(Floats x) { return SumOf(_mm256_add_ps(High(x), _mm512_castps512_ps256(x))); }
LOGPROBD_INLINE float MaxOf(Floats x) { return MaxOf(_mm256_max_ps(High(x), _mm512_castps512_ps256(x))); }

}  // namespace LOGPROBD_NAMESPACE
