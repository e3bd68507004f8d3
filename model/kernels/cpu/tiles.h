// The arithmetic of linear.cc: one tile of y = x W^T, up to 12 rows by 32 columns, on three paths that agree.
//
// W is packed as [ceil(N/32)][ceil(K/2)][32][2]: blocks of 32 output columns, and in a block the pairs of K in order,
// so that one 64-byte load holds one pair for 16 columns. Columns and K are padded with zeros; x is as XLA has it.
//
// The promise: an output is one float32 accumulator that takes K in one fixed order, so a row has the same bits for
// every M, every split over threads and every place in the batch. The order is that of vdpbf16ps: pairs ascend, and a
// pair (a, b) adds its second element first, acc = fma(xb, wb, acc), then acc = fma(xa, wa, acc), each rounded to
// nearest even, denormals in or out taken as zero. The vector paths below agree on every bit. The product of two
// bfloat16 is exact in float32, so the portable path's multiply and add do too while products stay in the normal range.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "vectors.h"

namespace {

constexpr int64_t kColumns = 32;         // output columns in a block of W
constexpr int64_t kPair = 2 * kColumns;  // elements of W that a pair of K takes in a block: two cache lines
constexpr int64_t kMaxRows = 12;         // rows of a tile: 24 accumulators, 4 registers for W and 2 for x
constexpr int64_t kAhead = 4096;         // elements of W, 8 KiB, that a lone tile fetches ahead
constexpr int64_t kChunk = 256;          // elements of K whose x and W stay in the first-level cache together

struct Problem {
  const uint16_t* x;
  const uint16_t* w;       // bfloat16, or two int8
  const uint16_t* scales;  // float16 of int8 weights: [blocks, groups, 32]
  void* y;
  bool bf16;  // y is bfloat16, else float32
  int64_t m, n, k, blocks;
  int64_t stride;  // of a block of w, in elements of 16 bits
};

constexpr int64_t kGroup = 32;  // elements of K that share a scale

int64_t Groups(const Problem& p) { return (p.k + kGroup - 1) / kGroup; }

// The part of a problem with columns [first, first + count), `first` at the beginning of a block, and y [M, count].
Problem Columns(const Problem& whole, int64_t first, int64_t count, float* y) {
  const int64_t block = first / kColumns;
  Problem part = whole;
  part.w += block * whole.stride;
  if (whole.scales != nullptr) part.scales += block * Groups(whole) * kColumns;
  part.y = y;
  part.bf16 = false;
  part.n = count;
  part.blocks = (count + kColumns - 1) / kColumns;
  return part;
}


// One tile's place, and the two streams of cache lines to fetch meanwhile: one line of each for every pair of K.
struct Place {
  int64_t row, block;
  const uint16_t* ahead[2];
};

using Tile = void (*)(const Problem& problem, const Place& place);
using TileTable = const Tile*;  // [rows - 1]

// Any CPU: the order in plain words.
template <int kRows>
void PortableTile(const Problem& p, const Place& place) {
  const int64_t columns = std::min(kColumns, p.n - place.block * kColumns);
  for (int64_t row = place.row; row < place.row + kRows; ++row) {
    const uint16_t* x = p.x + row * p.k;
    const uint16_t* w = p.w + place.block * p.stride;
    float sum[kColumns] = {};
    for (int64_t at = 0; at < p.k; at += 2, w += kPair) {
      const float a = ToFloat(x[at]), b = at + 1 < p.k ? ToFloat(x[at + 1]) : 0.0f;
      for (int64_t c = 0; c < kColumns; ++c) {
        sum[c] += b * ToFloat(w[2 * c + 1]);
        sum[c] += a * ToFloat(w[2 * c]);
      }
    }
    const int64_t out = row * p.n + place.block * kColumns;
    for (int64_t c = 0; c < columns; ++c) {
      if (p.bf16) {
        static_cast<uint16_t*>(p.y)[out + c] = ToBf16(sum[c]);
      } else {
        static_cast<float*>(p.y)[out + c] = sum[c];
      }
    }
  }
}

using RowCounts = std::make_integer_sequence<int, kMaxRows>;

template <int... kIndex>
TileTable PortableTable(std::integer_sequence<int, kIndex...>) {
  static constexpr Tile table[] = {PortableTile<kIndex + 1>...};
  return table;
}

TileTable PortableTiles() { return PortableTable(RowCounts()); }

#if defined(__x86_64__)

// AVX512_BF16: one instruction a pair. Best where it runs at the rate of a fused multiply-add (AMD from Zen 4 on), and
// for one row, which waits for memory and for the sum before it.
struct DotPairs {
  using X = uint16_t;
  struct W {
    __m512 pair[2];
  };
  static AVX512_INLINE void Stage(X* to, const uint16_t* x, int64_t count) {
    std::memcpy(to, x, static_cast<size_t>(count) * sizeof(X));
  }
  static AVX512_INLINE W Load(const uint16_t* w) {
    return {{_mm512_loadu_ps(w), _mm512_loadu_ps(w + kColumns)}};
  }
  static AVX512_INLINE void Step(__m512 (&acc)[2], const W& w, const X* x) {
    int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    const __m512i pair = _mm512_set1_epi32(bits);
    // Written out, so that the tile needs no second set of target flags.
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc[0]) : "v"(w.pair[0]), "v"(pair));
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc[1]) : "v"(w.pair[1]), "v"(pair));
  }
};

// AVX512F: widen to float32, two multiply-adds a pair. Intel runs four of them in the time of one vdpbf16ps (a Xeon of
// family 6, model 207: 165 against 80 GFLOP/s a core).
struct FusedFloats {
  using X = float;
  struct W {
    __m512 first[2], second[2];
  };
  static AVX512_INLINE void Stage(X* to, const uint16_t* x, int64_t count) {
    const int64_t whole = count & ~int64_t{15};
    for (int64_t i = 0; i < whole; i += 16) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
      _mm512_storeu_si512(to + i, _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    const auto rest = static_cast<__mmask16>((1u << (count - whole)) - 1);
    const __m256i bits = _mm256_maskz_loadu_epi16(rest, x + whole);
    _mm512_mask_storeu_epi32(to + whole, rest, _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static AVX512_INLINE W Load(const uint16_t* w) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const __m512i a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(w + kColumns);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high))}};
  }
  static AVX512_INLINE void Step(__m512 (&acc)[2], const W& w, const X* x) {
    const __m512 second = _mm512_set1_ps(x[1]);
    acc[0] = _mm512_fmadd_ps(second, w.second[0], acc[0]);
    acc[1] = _mm512_fmadd_ps(second, w.second[1], acc[1]);
    const __m512 first = _mm512_set1_ps(x[0]);
    acc[0] = _mm512_fmadd_ps(first, w.first[0], acc[0]);
    acc[1] = _mm512_fmadd_ps(first, w.first[1], acc[1]);
  }
};

AVX512_INLINE void Store(const Problem& p, int64_t row, int64_t block, const __m512 (&acc)[2]) {
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t column = block * kColumns + half * 16;
    const int64_t count = std::clamp<int64_t>(p.n - column, 0, 16);
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    if (p.bf16) {
      StoreBf16(static_cast<uint16_t*>(p.y) + row * p.n + column, mask, acc[half]);
    } else {
      _mm512_mask_storeu_ps(static_cast<float*>(p.y) + row * p.n + column, mask, acc[half]);
    }
  }
}

template <typename Ops, int kRows>
AVX512 void VectorTile(const Problem& p, const Place& place) {
  alignas(64) typename Ops::X x[kRows][kChunk];
  __m512 acc[kRows][2];
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  const uint16_t* w = p.w + place.block * p.stride;
  const uint16_t *ahead0 = place.ahead[0], *ahead1 = place.ahead[1];
  for (int64_t from = 0; from < p.k; from += kChunk) {
    const int64_t count = std::min(kChunk, p.k - from);
    for (int r = 0; r < kRows; ++r) {
      Ops::Stage(x[r], p.x + (place.row + r) * p.k + from, count);
      if (count % 2 != 0) x[r][count] = 0;
    }
    for (int64_t i = 0; i < count; i += 2, w += kPair, ahead0 += kPair, ahead1 += kPair) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead0), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(ahead1), _MM_HINT_T1);
      const typename Ops::W pair = Ops::Load(w);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) Ops::Step(acc[r], pair, &x[r][i]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) Store(p, place.row + r, place.block, acc[r]);
}

// int8 weights with a scale for 32 elements of K: widened, scaled (8 bits times float16's 11 are exact in float32), then
// one fused multiply-add each, K ascending. W lies as [ceil(N/32)][ceil(K/32) * 32][32]: 32 bytes for each element of K.
template <int kRows>
AVX512 void Int8Tile(const Problem& p, const Place& place) {
  alignas(64) float x[kRows][kChunk];
  __m512 acc[kRows][2];
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  const auto* w = reinterpret_cast<const int8_t*>(p.w + place.block * p.stride);
  const uint16_t* scale = p.scales + place.block * Groups(p) * kColumns;
  const uint16_t *ahead0 = place.ahead[0], *ahead1 = place.ahead[1];
  for (int64_t from = 0; from < p.k; from += kChunk) {
    const int64_t count = std::min(kChunk, p.k - from), padded = (count + kGroup - 1) / kGroup * kGroup;
    for (int r = 0; r < kRows; ++r) {
      FusedFloats::Stage(x[r], p.x + (place.row + r) * p.k + from, count);
      std::fill(x[r] + count, x[r] + padded, 0.0f);
    }
    for (int64_t group = 0; group < padded; group += kGroup, scale += kColumns) {
      const __m512 s0 = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scale)));
      const __m512 s1 = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scale + kLanes)));
      for (int64_t i = group; i < group + kGroup; ++i, w += kColumns) {
        if (i % 4 == 0) {  // four elements of K are two cache lines
          _mm_prefetch(reinterpret_cast<const char*>(ahead0), _MM_HINT_T1);
          _mm_prefetch(reinterpret_cast<const char*>(ahead1), _MM_HINT_T1);
          ahead0 += kPair;
          ahead1 += kPair;
        }
        const __m512i q0 = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
        const __m512i q1 = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + kLanes)));
        const __m512 w0 = _mm512_mul_ps(_mm512_cvtepi32_ps(q0), s0);
        const __m512 w1 = _mm512_mul_ps(_mm512_cvtepi32_ps(q1), s1);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          const __m512 v = _mm512_set1_ps(x[r][i]);
          acc[r][0] = _mm512_fmadd_ps(v, w0, acc[r][0]);
          acc[r][1] = _mm512_fmadd_ps(v, w1, acc[r][1]);
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) Store(p, place.row + r, place.block, acc[r]);
}

template <int... kIndex>
TileTable Int8Table(std::integer_sequence<int, kIndex...>) {
  static constexpr Tile table[] = {Int8Tile<kIndex + 1>...};
  return table;
}

TileTable Int8Tiles() { return Int8Table(RowCounts()); }

bool HasPairs() { return HasFloats() && __builtin_cpu_supports("avx512bf16"); }

template <typename OneRow, typename Ops, int... kIndex>
TileTable VectorTable(std::integer_sequence<int, kIndex...>) {
  static constexpr Tile table[] = {VectorTile<std::conditional_t<kIndex == 0, OneRow, Ops>, kIndex + 1>...};
  return table;
}

TileTable PairTiles() { return VectorTable<DotPairs, DotPairs>(RowCounts()); }
TileTable FloatTiles() { return VectorTable<FusedFloats, FusedFloats>(RowCounts()); }

TileTable FastestTiles() {
  if (!HasFloats()) return PortableTiles();
  if (!HasPairs()) return FloatTiles();
  return __builtin_cpu_is("intel") ? VectorTable<DotPairs, FusedFloats>(RowCounts()) : PairTiles();
}

#else

bool HasPairs() { return false; }
TileTable PairTiles() { return PortableTiles(); }
TileTable FloatTiles() { return PortableTiles(); }
TileTable FastestTiles() { return PortableTiles(); }
TileTable Int8Tiles() { return nullptr; }  // the library is not used where this is compiled

#endif

// All rows of y for one block of columns; `more`: the next block is to be computed here, too.
void Compute(const Problem& p, TileTable table, int64_t block, bool more) {
  const int64_t tiles = (p.m + kMaxRows - 1) / kMaxRows;
  const uint16_t* here = p.w + block * p.stride;
  const uint16_t* next = more ? here + p.stride : here;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = p.m * t / tiles, rows = p.m * (t + 1) / tiles - row;
    // A single tile reads W as fast as it comes: it fetches what it needs soon, past the block's end too, since the next
    // block lies behind it. Of several, the first two fetch the next block: its even lines, then its odd lines.
    const uint16_t* line0 = tiles == 1 ? here + kAhead : t == 0 ? next : here;
    const uint16_t* line1 = (tiles == 1 ? here + kAhead : t == 1 ? next : here) + kColumns;
    table[rows - 1](p, {row, block, {line0, line1}});
  }
}

}  // namespace
