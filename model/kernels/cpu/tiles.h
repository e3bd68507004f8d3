// The float32 arithmetic of linear.cc: y = x W^T for a W of float16, bfloat16 or float32, packed as in formats.h, some
// blocks of 32 output columns at a time. Formats of codes have that of integers.h.
//
// Determinism: an output is one float32 accumulator over K in one fixed order, so a row has the same bits for every M,
// every split over threads and every position in the batch, and on every CPU: acc = fma(x, w, acc), K ascending. If x is
// bfloat16, as W is, the order is that of vdpbf16ps: pairs of K ascend, and a pair adds its second element first. Each
// step rounds once, to nearest even; denormal inputs and results count as zero.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include "formats.h"
#include "layout.h"
#include "vectors.h"

namespace LOGPROBD_NAMESPACE {

constexpr int64_t kChunk = 128;      // elements of K whose weights are unpacked at once, into the first-level cache
constexpr int kFewRows = 4;          // maximum number of rows that use each weight right after it is unpacked
constexpr int64_t kAhead = 512;      // prefetch distance of few rows, in elements of K
constexpr int64_t kCachedRows = 64;  // maximum number of rows of x that stay in the second-level cache
static_assert(kColumns == 2 * kLanes && kChunk % kStep == 0);

struct Problem {
  const void* x;          // [m, k], rows x_stride apart: float32, with zeros up to a multiple of kStep, or bfloat16;
                          // or the integers of integers.h [groups of K, x_stride]
  const uint32_t* words;  // of W, as in formats.h
  const void* scales;
  float* y;  // [m, n]
  int64_t m, n, k, x_stride, row_bytes;            // row_bytes: from a row of x to the next
  int64_t block_words, block_scales, scale_bytes;  // words and scales of a block of columns; size of a scale
};

// Elements of K that are added, the last ones zeros: the same for any number of rows.
constexpr int64_t DepthOf(int64_t k) { return (k + kStep - 1) / kStep * kStep; }

// The part of a problem with columns [first, first + count), `first` at the beginning of a block, and y [M, count].
inline Problem Columns(const Problem& full, int64_t first, int64_t count, float* y) {
  const int64_t block = first / kColumns;
  Problem part = full;
  part.words += block * full.block_words;
  part.scales = static_cast<const char*>(full.scales) + block * full.block_scales * full.scale_bytes;
  part.y = y;
  part.n = count;
  return part;
}

// Computes all rows of y for blocks [first, last) of columns.
using Panel = void (*)(const Problem& problem, int64_t first, int64_t last);

// 16 columns of W from the half `half` of a block of columns on, at element k of K.
template <class Format>
struct Position {
  const uint32_t* words;
  const typename Format::Scales* scales = nullptr;
  int64_t group, quad;  // of the block of K

  LOGPROBD_INLINE Position(const Problem& p, int64_t block, int64_t half, int64_t k)
      : group(k % Format::kBlock / Format::kGroup), quad(k % Format::kBlock / 4) {
    const int64_t in_k = k / Format::kBlock;
    words = p.words + block * p.block_words + in_k * Format::kWords * kColumns + half * kLanes;
    if constexpr (Format::kScaleBytes > 0) {
      const auto* all = static_cast<const typename Format::Scales*>(p.scales);
      scales = all + block * p.block_scales + in_k * kColumns + half * kLanes;
    }
  }
};

// Element i of the order in which K is added.
template <bool kPairs>
constexpr int64_t InOrder(int64_t i) {
  return kPairs ? i ^ 1 : i;
}

// Fetches the words and scales of elements [k, k + count) of K of a block of columns.
template <class Format>
LOGPROBD_INLINE void Prefetch(const Problem& p, int64_t block, int64_t k, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(uint32_t), kWordsOfBlock = Format::kWords * kColumns;
  const Position<Format> at(p, block, 0, k);
  const int64_t first = k % Format::kBlock * kWordsOfBlock / Format::kBlock / kLine * kLine;
  for (int64_t i = 0; i < count * kWordsOfBlock / Format::kBlock; i += kLine) {
    __builtin_prefetch(at.words + first + i, 0, 2);
  }
  if constexpr (Format::kScaleBytes > 0) __builtin_prefetch(at.scales, 0, 2);
}

#define LOGPROBD_UNROLLED __attribute__((always_inline))

// Calls body(0), ..., body(kCount - 1) with constants, so that arrays that are indexed with them stay in registers.
template <int... kIndex, typename Body>
LOGPROBD_INLINE void RepeatEach(std::integer_sequence<int, kIndex...>, Body&& body) {
  (body(std::integral_constant<int, kIndex>()), ...);
}
template <int kCount, typename Body>
LOGPROBD_INLINE void Repeat(Body&& body) {
  RepeatEach(std::make_integer_sequence<int, kCount>(), body);
}

// kRows rows and kVectors times 16 columns from the start of a block on, and of the next one if that many. `last` is the
// end of the blocks that this thread computes.
template <class Format, bool kPairs, int kRows, int kVectors>
void FewRows(const Problem& p, int64_t block, int64_t last) {
  constexpr int64_t kQuads = Format::kGroup / 4;
  Floats acc[kRows][kVectors];
  Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED {
    Repeat<kVectors>([&](auto v) LOGPROBD_UNROLLED { acc[r][v] = Zeros(); });
  });
  for (int64_t first = 0; first < p.k; first += Format::kGroup) {
    const uint32_t* words[kVectors];
    Repeat<kVectors>([&](auto v) LOGPROBD_UNROLLED {
      const Position<Format> at(p, block + v / 2, v % 2, first);
      words[v] = at.words;
    });
    // Of the same blocks, or of the beginning of the next ones.
    const int64_t ahead = first + kAhead, past = ahead >= p.k ? kVectors / 2 : 0;
    for (int64_t b = 0; b < kVectors / 2; ++b) {
      if (block + b + past < last) Prefetch<Format>(p, block + b + past, past > 0 ? ahead - p.k : ahead, Format::kGroup);
    }
    const float* x = static_cast<const float*>(p.x) + first;
    const int64_t quad = first % Format::kBlock / 4;
    for (int64_t q = 0; q < kQuads; ++q) {
      Repeat<kVectors>([&](auto v) LOGPROBD_UNROLLED {
        Floats w[4];
        Format::Values(words[v], quad + q, w);
        Repeat<4>([&](auto i) LOGPROBD_UNROLLED {
          constexpr int kElement = InOrder<kPairs>(i);
          Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED {
            acc[r][v] = Fma(Fill(x[r * p.x_stride + 4 * q + kElement]), w[kElement], acc[r][v]);
          });
        });
      });
    }
  }
  Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED {
    Repeat<kVectors>([&](auto v) LOGPROBD_UNROLLED {
      const int64_t column = block * kColumns + v * kLanes;
      if (column < p.n) StoreSome(p.y + r * p.n + column, p.n - column, acc[r][v]);
    });
  });
}

template <class Format, bool kPairs, int kRows>
void FewRowsOfBlocks(const Problem& p, int64_t first, int64_t last) {
  int64_t block = first;
  if constexpr (kRows == 1) {
    for (; block + 1 < last; block += 2) FewRows<Format, kPairs, kRows, 4>(p, block, last);
  }
  for (; block < last; ++block) FewRows<Format, kPairs, kRows, 2>(p, block, last);
}

// Weights of elements [k, k + count) of K of a block of columns; count is a multiple of kStep.
template <class Format>
void Unpack(const Problem& p, int64_t block, int64_t k, int64_t count, float (&to)[kChunk][kColumns]) {
  constexpr int64_t kQuads = Format::kGroup / 4;
  for (int64_t i = 0; i < count; i += Format::kGroup) {
    for (int64_t half = 0; half < 2; ++half) {
      const Position<Format> at(p, block, half, k + i);
      for (int64_t q = 0; q < kQuads; ++q) {
        Floats w[4];
        Format::Values(at.words, at.quad + q, w);
        for (int64_t j = 0; j < 4; ++j) Store(&to[i + 4 * q + j][half * kLanes], w[j]);
      }
    }
  }
}

// Adds `count` elements of K, x [kRows, kChunk] times the unpacked weights, to sums [kRows, kColumns].
template <bool kPairs, int kRows>
void Tile(const float* x, const float (&w)[kChunk][kColumns], int64_t count, float* sums) {
  for (int half = 0; half < 2; half += kTileColumns) {
    Floats acc[kRows][kTileColumns];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kTileColumns; ++c) acc[r][c] = Load(sums + r * kColumns + (half + c) * kLanes);
    }
    for (int64_t k = 0; k < count; k += 2) {
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t element = k + InOrder<kPairs>(i);
        Floats weights[kTileColumns];
        for (int c = 0; c < kTileColumns; ++c) weights[c] = Load(&w[element][(half + c) * kLanes]);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          const Floats value = Fill(x[r * kChunk + element]);
          for (int c = 0; c < kTileColumns; ++c) acc[r][c] = Fma(value, weights[c], acc[r][c]);
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kTileColumns; ++c) Store(sums + r * kColumns + (half + c) * kLanes, acc[r][c]);
    }
  }
}

using TileOfRows = void (*)(const float*, const float (&)[kChunk][kColumns], int64_t, float*);

// Tiles of 1 to kTileRows rows.
template <bool kPairs, int... kIndex>
const TileOfRows* TilesOf(std::integer_sequence<int, kIndex...>) {
  static constexpr TileOfRows table[] = {Tile<kPairs, kIndex + 1>...};
  return table;
}

// Computes many rows of y for blocks [first, last) of columns, in tiles of kMaxRows rows at most. Some blocks take a chunk
// of K in turn, so that its part of x stays in a cache: for elements [from, from + count) of K, enter(from, count); for
// each block, unpack(block, from, count); for each tile, add(row, rows, from, count, sums), with sums [rows, kColumns].
template <class Format, int kMaxRows, typename Enter, typename UnpackBlock, typename Add>
void ForEachTile(const Problem& p, int64_t first, int64_t last, Enter enter, UnpackBlock unpack, Add add) {
  const int64_t tiles = (p.m + kMaxRows - 1) / kMaxRows, depth = DepthOf(p.k);
  const int64_t together = std::min(p.m <= kCachedRows ? 4 : last - first, last - first);
  const std::unique_ptr<float[]> sums(new float[static_cast<size_t>(together * p.m * kColumns)]);  // of each block
  for (int64_t start = first; start < last; start += together) {
    const int64_t end = std::min(last, start + together);
    std::fill_n(sums.get(), (end - start) * p.m * kColumns, 0.0f);
    for (int64_t from = 0; from < depth; from += kChunk) {
      const int64_t count = std::min(kChunk, depth - from);
      enter(from, count);
      for (int64_t block = start; block < end; ++block) {
        unpack(block, from, count);
        if (block + 1 < end) {
          Prefetch<Format>(p, block + 1, from, count);
        } else if (from + count < depth) {
          Prefetch<Format>(p, start, from + count, std::min(kChunk, depth - from - count));
        }
        float* of_block = sums.get() + (block - start) * p.m * kColumns;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = p.m * t / tiles;
          add(row, p.m * (t + 1) / tiles - row, from, count, of_block + row * kColumns);
        }
      }
    }
    for (int64_t block = start; block < end; ++block) {
      const float* of_block = sums.get() + (block - start) * p.m * kColumns;
      const int64_t column = block * kColumns, columns = std::min(kColumns, p.n - column);
      for (int64_t r = 0; r < p.m; ++r) std::copy_n(of_block + r * kColumns, columns, p.y + r * p.n + column);
    }
  }
}

template <class Format, bool kPairs>
void ManyRows(const Problem& p, int64_t first, int64_t last) {
  const TileOfRows* tile = TilesOf<kPairs>(std::make_integer_sequence<int, kTileRows>());
  const auto* x = static_cast<const float*>(p.x);
  const std::unique_ptr<float[]> chunk(new float[static_cast<size_t>(p.m * kChunk)]);  // of x, [m, kChunk]
  alignas(64) float w[kChunk][kColumns];
  ForEachTile<Format, kTileRows>(
      p, first, last,
      [&](int64_t from, int64_t count) {
        for (int64_t r = 0; r < p.m; ++r) std::copy_n(x + r * p.x_stride + from, count, chunk.get() + r * kChunk);
      },
      [&](int64_t block, int64_t from, int64_t count) { Unpack<Format>(p, block, from, count, w); },
      [&](int64_t row, int64_t rows, int64_t, int64_t count, float* sums) {
        tile[rows - 1](chunk.get() + row * kChunk, w, count, sums);
      });
}

template <class Format, bool kPairs>
void RunPanel(const Problem& p, int64_t first, int64_t last) {
  static_assert(kFewRows == 4);
  switch (p.m) {
    case 1:
      return FewRowsOfBlocks<Format, kPairs, 1>(p, first, last);
    case 2:
      return FewRowsOfBlocks<Format, kPairs, 2>(p, first, last);
    case 3:
      return FewRowsOfBlocks<Format, kPairs, 3>(p, first, last);
    case 4:
      return FewRowsOfBlocks<Format, kPairs, 4>(p, first, last);
    default:
      return ManyRows<Format, kPairs>(p, first, last);
  }
}

}  // namespace LOGPROBD_NAMESPACE
