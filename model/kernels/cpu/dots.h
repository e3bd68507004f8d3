// y = x W^T for bfloat16 x and W by AVX512_BF16's vdpbf16ps: a pair of K in one instruction, with the order of tiles.h.

#pragma once

#include "tiles.h"

namespace LOGPROBD_NAMESPACE {

#if defined(__AVX512F__)

constexpr int64_t kPair = 2 * kColumns;    // elements of W per pair of K in a block: two cache lines
constexpr int64_t kPairsAhead = 4096;      // elements, 8 KiB: prefetch distance of a single tile
constexpr int64_t kDotChunk = 256;         // elements of K whose x and W fit into the first-level cache together

inline bool HasDots() { return __builtin_cpu_supports("avx512bf16"); }

// Position of a tile, and the two streams of cache lines to prefetch meanwhile.
struct DotPlace {
  int64_t row, block;
  const uint16_t* ahead[2];
};

// acc += the products of a pair of K of 16 columns with the pair `x` of a row, in every lane.
LOGPROBD_INLINE void AddDots(Floats& acc, Floats pairs, const uint16_t* x) {
  int32_t bits;
  std::memcpy(&bits, x, sizeof bits);
  // Inline assembly: the library needs no separate build with this instruction set.
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(pairs), "v"(_mm512_set1_epi32(bits)));
}

template <int kRows>
void DotTile(const Problem& p, const DotPlace& place) {
  alignas(64) uint16_t x[kRows][kDotChunk];
  Floats acc[kRows][2];
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = Zeros();
  const auto* w = reinterpret_cast<const uint16_t*>(p.words + place.block * p.block_words);
  const uint16_t *ahead0 = place.ahead[0], *ahead1 = place.ahead[1];
  for (int64_t from = 0; from < p.k; from += kDotChunk) {
    const int64_t count = std::min(kDotChunk, p.k - from);
    for (int r = 0; r < kRows; ++r) {
      std::copy_n(static_cast<const uint16_t*>(p.x) + (place.row + r) * p.x_stride + from, count, x[r]);
      if (count % 2 != 0) x[r][count] = 0;
    }
    for (int64_t i = 0; i < count; i += 2) {
      __builtin_prefetch(ahead0, 0, 2);
      __builtin_prefetch(ahead1, 0, 2);
      ahead0 += kPair;
      ahead1 += kPair;
      const Floats first = _mm512_loadu_ps(w), second = _mm512_loadu_ps(w + kColumns);
      w += kPair;
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        AddDots(acc[r][0], first, &x[r][i]);
        AddDots(acc[r][1], second, &x[r][i]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half) {
      const int64_t column = place.block * kColumns + half * kLanes;
      if (column < p.n) StoreSome(p.y + (place.row + r) * p.n + column, p.n - column, acc[r][half]);
    }
  }
}

using TileOfDots = void (*)(const Problem&, const DotPlace&);

template <int... kIndex>
const TileOfDots* DotTiles(std::integer_sequence<int, kIndex...>) {
  static constexpr TileOfDots table[] = {DotTile<kIndex + 1>...};
  return table;
}

// A Panel of a bfloat16 W.
inline void RunDots(const Problem& p, int64_t first, int64_t last) {
  const TileOfDots* tile = DotTiles(std::make_integer_sequence<int, kTileRows>());
  const int64_t tiles = (p.m + kTileRows - 1) / kTileRows;
  for (int64_t block = first; block < last; ++block) {
    const auto* here = reinterpret_cast<const uint16_t*>(p.words + block * p.block_words);
    const uint16_t* next = block + 1 < last ? here + 2 * p.block_words : here;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = p.m * t / tiles, rows = p.m * (t + 1) / tiles - row;
      // A single tile is bound by memory: it prefetches a fixed distance ahead, also past the block's end, where the
      // next block starts. Of several tiles, the first two prefetch the next block: its even lines, then its odd lines.
      const uint16_t* line0 = tiles == 1 ? here + kPairsAhead : t == 0 ? next : here;
      const uint16_t* line1 = (tiles == 1 ? here + kPairsAhead : t == 1 ? next : here) + kColumns;
      tile[rows - 1](p, {row, block, {line0, line1}});
    }
  }
}

#else

inline bool HasDots() { return false; }

#endif

}  // namespace LOGPROBD_NAMESPACE
