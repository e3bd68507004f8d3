// The arithmetic of linear.cc: one tile of y = x W^T, some rows by 32 columns.
//
// A bfloat16 W is packed as [ceil(N/32)][ceil(K/2)][32][2]: blocks of 32 output columns, and in a block the pairs of K
// in order, so that one 64-byte load holds one pair for 16 columns. int8 is stored as
// [ceil(N/32)][ceil(K/32) * 32][32] with float16 scales [ceil(N/32)][ceil(K/32)][32]. Columns and K are padded with
// zeros; x is row-major, as in XLA.
//
// Determinism: an output is one float32 accumulator over K in one fixed order, so a row has the same bits for every M,
// every split over threads and every position in the batch, and on every CPU. For bfloat16 the order is that of
// vdpbf16ps: pairs ascend, and a pair (a, b) adds its second element first, acc = fma(xb, wb, acc), then
// acc = fma(xa, wa, acc). int8 is widened and scaled, which is exact (8 bits times float16's 11), then K ascends one by
// one. Each step rounds once, to nearest even; denormal inputs and results count as zero.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "layout.h"
#include "vectors.h"

namespace LOGPROBD_NAMESPACE {

constexpr int64_t kPair = 2 * kColumns;  // elements of W per pair of K in a block: two cache lines of bfloat16
constexpr int64_t kAhead = 4096;         // 16-bit elements of W, 8 KiB: prefetch distance of a single tile
constexpr int64_t kChunk = 256;          // elements of K whose x and W fit into the first-level cache together
static_assert(kColumns == 2 * kLanes && kChunk % kGroup == 0);

struct Problem {
  const uint16_t* x;
  const uint16_t* w;       // bfloat16, or two int8
  const uint16_t* scales;  // float16 of int8 weights
  void* y;
  bool bf16;  // y is bfloat16, else float32
  int64_t m, n, k, blocks;
  int64_t stride;  // of a block of w, in elements of 16 bits
};

inline int64_t Groups(const Problem& p) { return (p.k + kGroup - 1) / kGroup; }

// The part of a problem with columns [first, first + count), `first` at the beginning of a block, and y [M, count].
inline Problem Columns(const Problem& full, int64_t first, int64_t count, float* y) {
  const int64_t block = first / kColumns;
  Problem part = full;
  part.w += block * full.stride;
  if (full.scales != nullptr) part.scales += block * Groups(full) * kColumns;
  part.y = y;
  part.bf16 = false;
  part.n = count;
  part.blocks = (count + kColumns - 1) / kColumns;
  return part;
}

// Position of a tile, and the two streams of cache lines to prefetch meanwhile.
struct Place {
  int64_t row, block;
  const uint16_t* ahead[2];
};

using Tile = void (*)(const Problem& problem, const Place& place);
using TileTable = const Tile*;  // [rows - 1]

// The following classes read W pair by pair of K, for kHalves times 16 columns from the half `half` of a block, and add
// the product with a pair of one row of x to the row's accumulators. NextRun loads what the pairs of a run share.

// bfloat16: widened to float32, two multiply-adds per pair. Intel runs four of them in the time of one vdpbf16ps (a
// Xeon of family 6, model 207: 165 against 80 GFLOP/s per core).
template <int kHalves>
class FusedBf16 {
 public:
  using X = float;
  static constexpr int64_t kPairsOfTwoLines = 1, kRun = kChunk;

  FusedBf16(const Problem& p, int64_t block, int64_t half) : w_(p.w + block * p.stride + half * kColumns) {}

  static LOGPROBD_INLINE void Stage(X* to, const uint16_t* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) Store(to + i, LoadSome(x + i, count - i));
  }
  LOGPROBD_INLINE void NextRun() {}
  LOGPROBD_INLINE void NextPair() {
    for (int h = 0; h < kHalves; ++h) pair_[h] = LoadPairs(w_ + h * kColumns);
    w_ += kPair;
  }
  LOGPROBD_INLINE void AddTo(Floats (&acc)[kHalves], const X* x) const {
    const Floats second = Fill(x[1]);
    for (int h = 0; h < kHalves; ++h) acc[h] = Fma(second, pair_[h].second, acc[h]);
    const Floats first = Fill(x[0]);
    for (int h = 0; h < kHalves; ++h) acc[h] = Fma(first, pair_[h].first, acc[h]);
  }

 private:
  const uint16_t* w_;
  Pairs pair_[kHalves];
};

template <int kHalves>
class FusedInt8 {
 public:
  using X = float;
  static constexpr int64_t kPairsOfTwoLines = 2, kRun = kGroup;

  FusedInt8(const Problem& p, int64_t block, int64_t half)
      : w_(reinterpret_cast<const int8_t*>(p.w + block * p.stride) + half * kLanes),
        scales_(p.scales + block * Groups(p) * kColumns + half * kLanes) {}

  static LOGPROBD_INLINE void Stage(X* to, const uint16_t* x, int64_t count) {
    FusedBf16<kHalves>::Stage(to, x, count);
  }
  LOGPROBD_INLINE void NextRun() {
    for (int h = 0; h < kHalves; ++h) scale_[h] = LoadFloat16(scales_ + h * kLanes);
    scales_ += kColumns;
  }
  LOGPROBD_INLINE void NextPair() {
    for (int h = 0; h < kHalves; ++h) {
      pair_[h] = {Mul(LoadInt8(w_ + h * kLanes), scale_[h]), Mul(LoadInt8(w_ + kColumns + h * kLanes), scale_[h])};
    }
    w_ += 2 * kColumns;
  }
  LOGPROBD_INLINE void AddTo(Floats (&acc)[kHalves], const X* x) const {
    const Floats first = Fill(x[0]);
    for (int h = 0; h < kHalves; ++h) acc[h] = Fma(first, pair_[h].first, acc[h]);
    const Floats second = Fill(x[1]);
    for (int h = 0; h < kHalves; ++h) acc[h] = Fma(second, pair_[h].second, acc[h]);
  }

 private:
  const int8_t* w_;
  const uint16_t* scales_;
  Floats scale_[kHalves];
  Pairs pair_[kHalves];
};

#if defined(__AVX512F__)

// AVX512_BF16: one instruction per pair. Fastest if it runs at the rate of a fused multiply-add (AMD since Zen 4), and
// for one row, which is bound by memory and by the latency of its accumulator.
template <int kHalves>
class DotBf16 {
 public:
  using X = uint16_t;
  static constexpr int64_t kPairsOfTwoLines = 1, kRun = kChunk;

  DotBf16(const Problem& p, int64_t block, int64_t half) : w_(p.w + block * p.stride + half * kColumns) {}

  static LOGPROBD_INLINE void Stage(X* to, const uint16_t* x, int64_t count) {
    std::memcpy(to, x, static_cast<size_t>(count) * sizeof(X));
    if (count % 2 != 0) to[count] = 0;
  }
  LOGPROBD_INLINE void NextRun() {}
  LOGPROBD_INLINE void NextPair() {
    for (int h = 0; h < kHalves; ++h) pair_[h] = _mm512_loadu_ps(w_ + h * kColumns);
    w_ += kPair;
  }
  LOGPROBD_INLINE void AddTo(Floats (&acc)[kHalves], const X* x) const {
    int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    const __m512i both = _mm512_set1_epi32(bits);
    // Inline assembly: the library needs no separate build with this instruction set.
    for (int h = 0; h < kHalves; ++h) __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc[h]) : "v"(pair_[h]), "v"(both));
  }

 private:
  const uint16_t* w_;
  Floats pair_[kHalves];
};

#endif

LOGPROBD_INLINE void StoreTile(const Problem& p, int64_t row, int64_t column, Floats acc) {
  const int64_t count = p.n - column, offset = row * p.n + column;
  if (p.bf16) {
    StoreSome(static_cast<uint16_t*>(p.y) + offset, count, acc);
  } else {
    StoreSome(static_cast<float*>(p.y) + offset, count, acc);
  }
}

// kRows rows and kHalves times 16 columns from the half `half` of a block on.
template <template <int> class Weights, int kRows, int kHalves>
LOGPROBD_INLINE void PartOfTile(const Problem& p, const Place& place, int64_t half) {
  alignas(64) typename Weights<kHalves>::X x[kRows][kChunk];
  Floats acc[kRows][kHalves];
  for (int r = 0; r < kRows; ++r) {
    for (int h = 0; h < kHalves; ++h) acc[r][h] = Zeros();
  }
  Weights<kHalves> weights(p, place.block, half);
  const uint16_t *ahead0 = place.ahead[0], *ahead1 = place.ahead[1];
  for (int64_t from = 0; from < p.k; from += kChunk) {
    const int64_t count = std::min(kChunk, p.k - from);
    for (int r = 0; r < kRows; ++r) Weights<kHalves>::Stage(x[r], p.x + (place.row + r) * p.k + from, count);
    for (int64_t run = 0; run < count; run += Weights<kHalves>::kRun) {
      weights.NextRun();
      const int64_t end = std::min(run + Weights<kHalves>::kRun, count);
      for (int64_t i = run; i < end; i += 2) {
        if (half == 0 && i % (2 * Weights<kHalves>::kPairsOfTwoLines) == 0) {
          __builtin_prefetch(ahead0, 0, 2);
          __builtin_prefetch(ahead1, 0, 2);
          ahead0 += kPair;
          ahead1 += kPair;
        }
        weights.NextPair();
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) weights.AddTo(acc[r], &x[r][i]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    for (int h = 0; h < kHalves; ++h) {
      const int64_t column = place.block * kColumns + (half + h) * kLanes;
      if (column < p.n) StoreTile(p, place.row + r, column, acc[r][h]);
    }
  }
}

template <template <int> class Weights, int kRows>
void FullTile(const Problem& p, const Place& place) {
  if constexpr (kRows <= kWideRows) {
    PartOfTile<Weights, kRows, 2>(p, place, 0);
  } else {
    PartOfTile<Weights, kRows, 1>(p, place, 0);
    PartOfTile<Weights, kRows, 1>(p, place, 1);
  }
}

// Tiles of 1 to kTileRows rows; OneRow is for the first.
template <template <int> class OneRow, template <int> class Weights, int... kIndex>
TileTable TableOf(std::integer_sequence<int, kIndex...>) {
  static constexpr Tile table[] = {FullTile<OneRow, 1>, FullTile<Weights, kIndex + 2>...};
  return table;
}
using MoreRows = std::make_integer_sequence<int, kTileRows - 1>;

inline TileTable FloatTiles() { return TableOf<FusedBf16, FusedBf16>(MoreRows()); }
inline TileTable Int8Tiles() { return TableOf<FusedInt8, FusedInt8>(MoreRows()); }

#if defined(__AVX512F__)

inline bool HasPairs() { return __builtin_cpu_supports("avx512bf16"); }
inline TileTable PairTiles() { return TableOf<DotBf16, DotBf16>(MoreRows()); }
inline TileTable FastestTiles() {
  if (!HasPairs()) return FloatTiles();
  return __builtin_cpu_is("intel") ? TableOf<DotBf16, FusedBf16>(MoreRows()) : PairTiles();
}

#else

inline bool HasPairs() { return false; }
inline TileTable PairTiles() { return FloatTiles(); }
inline TileTable FastestTiles() { return FloatTiles(); }

#endif

// Computes all rows of y for one block of columns. `more`: this thread also computes the next block.
inline void Compute(const Problem& p, TileTable table, int64_t block, bool more) {
  const int64_t tiles = (p.m + kTileRows - 1) / kTileRows;
  const uint16_t* here = p.w + block * p.stride;
  const uint16_t* next = more ? here + p.stride : here;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = p.m * t / tiles, rows = p.m * (t + 1) / tiles - row;
    // A single tile is bound by memory: it prefetches a fixed distance ahead, also past the block's end, where the next
    // block starts. Of several tiles, the first two prefetch the next block: its even lines, then its odd lines.
    const uint16_t* line0 = tiles == 1 ? here + kAhead : t == 0 ? next : here;
    const uint16_t* line1 = (tiles == 1 ? here + kAhead : t == 1 ? next : here) + kColumns;
    table[rows - 1](p, {row, block, {line0, line1}});
  }
}

}  // namespace LOGPROBD_NAMESPACE
