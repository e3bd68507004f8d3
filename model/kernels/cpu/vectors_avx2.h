// The operations of vectors.h in two AVX2 registers, with FMA and F16C, which all CPUs with AVX2 have.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "x86.h"

namespace LOGPROBD_NAMESPACE {

constexpr int kTileRows = 6;     // of the linear map: 12 accumulators of 16 registers
constexpr int kTileColumns = 1;  // vectors of W in a tile
constexpr int kTileVectors = 1;  // of attention, with 6 rows

struct Floats {
  __m256 low, high;
};
struct Mask {
  __m256 low, high;  // all bits of a lane set, or none
};

constexpr bool HasByteDots() { return true; }  // or this instruction set has one way
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

LOGPROBD_INLINE Floats LoadFloat16(const uint16_t* from) {
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}

// 16 words of 32 bits.
struct Words {
  __m256i low, high;
};
using UnsignedLanes = uint32_t __attribute__((vector_size(32)));

LOGPROBD_INLINE Words LoadWords(const uint32_t* from) {
  const auto* halves = reinterpret_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
LOGPROBD_INLINE void StoreWords(uint32_t* to, Words value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + 1, value.high);
}
LOGPROBD_INLINE Words LoadBytes(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
LOGPROBD_INLINE __m256i ShiftRight(__m256i a, int64_t bits) {
  return reinterpret_cast<__m256i>(reinterpret_cast<UnsignedLanes>(a) >> static_cast<uint32_t>(bits));
}
LOGPROBD_INLINE __m256i ShiftLeft(__m256i a, int64_t bits) {
  return reinterpret_cast<__m256i>(reinterpret_cast<UnsignedLanes>(a) << static_cast<uint32_t>(bits));
}
LOGPROBD_INLINE Words ShiftRight(Words a, int64_t bits) { return {ShiftRight(a.low, bits), ShiftRight(a.high, bits)}; }
LOGPROBD_INLINE Words ShiftLeft(Words a, int64_t bits) { return {ShiftLeft(a.low, bits), ShiftLeft(a.high, bits)}; }
LOGPROBD_INLINE Words ShiftRightSigned(Words a, int bits) {
  return {_mm256_srai_epi32(a.low, bits), _mm256_srai_epi32(a.high, bits)};
}
LOGPROBD_INLINE Words And(Words a, uint32_t mask) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(mask));
  return {_mm256_and_si256(a.low, all), _mm256_and_si256(a.high, all)};
}
LOGPROBD_INLINE Words Xor(Words a, uint32_t mask) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(mask));
  return {_mm256_xor_si256(a.low, all), _mm256_xor_si256(a.high, all)};
}
LOGPROBD_INLINE Words AddIntegers(Words a, Words b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
LOGPROBD_INLINE Words SubIntegers(Words a, Words b) {
  return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}
LOGPROBD_INLINE Words Or(Words a, Words b) {
  return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
// table[byte] of each byte, which is below 16.
LOGPROBD_INLINE Words Lookup(Words bytes, const uint8_t (&table)[16]) {
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(entries, bytes.low), _mm256_shuffle_epi8(entries, bytes.high)};
}
LOGPROBD_INLINE Floats ToFloats(Words signed_words) {
  return {_mm256_cvtepi32_ps(signed_words.low), _mm256_cvtepi32_ps(signed_words.high)};
}
LOGPROBD_INLINE Words ToWords(Floats a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
LOGPROBD_INLINE Words FillWords(uint32_t word) {
  return {_mm256_set1_epi32(static_cast<int>(word)), _mm256_set1_epi32(static_cast<int>(word))};
}
LOGPROBD_INLINE void StoreBytes(int8_t* to, Words a) {  // the lowest byte of each word
  a = And(a, 0xff);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.low, a.high), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}
LOGPROBD_INLINE int32_t SumOfIntegers(Words a) {
  const __m256i eight = _mm256_add_epi32(a.low, a.high);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}
LOGPROBD_INLINE Floats FromBits(Words bits) { return {_mm256_castsi256_ps(bits.low), _mm256_castsi256_ps(bits.high)}; }
// The low or the high half of each word, a float16.
LOGPROBD_INLINE Floats LowFloat16(Words a) {
  a = And(a, 0xffff);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.low, a.high), 0xd8);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
LOGPROBD_INLINE Floats HighFloat16(Words a) { return LowFloat16(ShiftRight(a, 16)); }

// A power of two: how many sums of two products of a code and a signed byte fit into 16 bits.
constexpr int QuadsOf16Bits(int max_code) {
  int quads = 1;
  while (2 * quads * 256 * max_code < 32768) quads *= 2;
  return quads;
}

// Sums of products of the bytes of codes, at most 63, and signed bytes, 4 in each of 16 columns: in 16 bits, which are
// added to those of 32 bits before they can overflow. Codes of one class overflow at the same time.
constexpr int MaxCodeOfSums(int max_code) {
  for (const int most : {15, 31, 63}) {
    if (max_code <= most) return most;
  }
  return 255;
}
struct ByteSums {
  static constexpr int kTileRows = 2;
  Words sums, pairs;

  LOGPROBD_INLINE void Start(int32_t start) {
    sums = FillWords(static_cast<uint32_t>(start));
    pairs = FillWords(0);
  }
  template <int kMaxCode>
  LOGPROBD_INLINE void Add(int quad, Words codes, const int8_t* four) {
    if (quad > 0 && quad % QuadsOf16Bits(kMaxCode) == 0) {
      sums = Total();
      pairs = FillWords(0);
    }
    int32_t word;
    std::memcpy(&word, four, sizeof word);
    const __m256i all = _mm256_set1_epi32(word);
    pairs = {_mm256_add_epi16(pairs.low, _mm256_maddubs_epi16(codes.low, all)),
             _mm256_add_epi16(pairs.high, _mm256_maddubs_epi16(codes.high, all))};
    __asm__("" : "+x"(pairs.low), "+x"(pairs.high));  // keeps GCC from holding all products, and adding them last
  }
  LOGPROBD_INLINE Words Total() const {
    const __m256i ones = _mm256_set1_epi16(1);
    return AddIntegers(sums, {_mm256_madd_epi16(pairs.low, ones), _mm256_madd_epi16(pairs.high, ones)});
  }
};

// The low 16 bits of 16 words, with the second and third of each four exchanged.
LOGPROBD_INLINE void StoreExchanged(int16_t* to, Words a) {
  const __m256i low = _mm256_shuffle_epi32(a.low, 0xd8), high = _mm256_shuffle_epi32(a.high, 0xd8);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}
// Adds the products of two 16-bit integers in each word with the two at `pair`.
LOGPROBD_INLINE void AddPairs(Words& sums, Words a, const int16_t* pair) {
  int32_t word;
  std::memcpy(&word, pair, sizeof word);
  const __m256i both = _mm256_set1_epi32(word);
  sums = AddIntegers(sums, {_mm256_madd_epi16(a.low, both), _mm256_madd_epi16(a.high, both)});
  __asm__("" : "+x"(sums.low), "+x"(sums.high));  // keeps GCC from holding all products, and adding them last
}

// 16 pairs of bfloat16: the first of each, and the second.
struct Pairs {
  Floats first, second;
};

// Lanes i and i + 8 first.
LOGPROBD_INLINE float SumOf(Floats x) { return SumOf(_mm256_add_ps(x.high, x.low)); }
LOGPROBD_INLINE float MaxOf(Floats x) { return MaxOf(_mm256_max_ps(x.high, x.low)); }

}  // namespace LOGPROBD_NAMESPACE

#include "vectors_parts.h"
