// Products with formats whose codes have at most 6 bits, by sums of integers: those are exact in any order.
//
// The elements of a group of K in a row of x (Format::kGroup of them) become integers of 24 bits and a power of two, so
// an element that is as large as the group's largest one keeps all its bits but one. An integer is three signed bytes,
// its digits of base 256. Of each digit, the products with the codes are added as 32-bit integers; the three sums then
// become one float32, which is multiplied by the group's factor and added to the output. A weight's value is that of
// formats.h before it is rounded: code * factor + offset.
//
// Determinism: the sums of integers have one value, and groups are added in ascending order, each by the same steps.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "formats.h"
#include "tiles.h"
#include "vectors.h"

namespace LOGPROBD_NAMESPACE {

constexpr int kDigits = 3;

// A group of K in a row of x: x[i] = scale * (65536 * digits[0][i] + 256 * digits[1][i] + digits[2][i]), rounded.
template <int64_t kSize>
struct Integers {
  int8_t digits[kDigits][kSize];
  int32_t start[kDigits];        // where sums start: for codes that are centered, -kZero times the sum of the integers
  float scale, high_scale, sum;  // high_scale = 65536 * scale; sum of the elements
};

// The largest integer whose digits are bytes: 127 * (65536 + 256 + 1).
constexpr float kMaxInteger = 8355711;

template <class Format>
void ToIntegers(const float* x, Integers<Format::kGroup>& to) {
  constexpr int kVectors = Format::kGroup / kLanes;
  Floats values[kVectors], largest = Zeros(), zeros = Zeros();
  for (int v = 0; v < kVectors; ++v) {
    values[v] = Load(x + v * kLanes);
    largest = Max(Abs(values[v]), largest);
    zeros = Fma(values[v], Zeros(), zeros);  // NaN, if a value is not finite
  }
  const float top = MaxOf(largest);
  uint32_t bits;
  std::memcpy(&bits, &top, sizeof bits);
  // 2^22 <= top * factor < 2^23. Neither the factor nor the scale, its inverse, is denormal.
  const uint32_t exponent = std::max<uint32_t>(bits >> 23, 23);
  const uint32_t factor_bits = (276 - exponent) << 23, scale_bits = (exponent - 22) << 23;
  float factor, scale;
  std::memcpy(&factor, &factor_bits, sizeof factor);
  std::memcpy(&scale, &scale_bits, sizeof scale);
  if (top * factor > kMaxInteger) {
    factor *= 0.5f;
    scale *= 2;
  }
  Words total = ToWords(Zeros());
  for (int v = 0; v < kVectors; ++v) {
    const Words integers = ToWords(Mul(values[v], Fill(factor)));
    const Words bytes = Xor(AddIntegers(integers, FillWords(0x808080)), 0x808080);
    for (int d = 0; d < kDigits; ++d) StoreBytes(&to.digits[d][v * kLanes], ShiftRight(bytes, 8 * (kDigits - 1 - d)));
    total = AddIntegers(total, integers);
  }
  const int32_t sum = SumOfIntegers(total);
  const int64_t start = -int64_t{Format::kZero} * sum;
  to.start[0] = static_cast<int32_t>(start >> 16);
  to.start[1] = 0;
  to.start[2] = static_cast<int32_t>(start & 0xffff);
  to.scale = scale + SumOf(zeros);
  to.high_scale = 65536 * to.scale;
  to.sum = static_cast<float>(sum) * to.scale;
}

// What the arithmetic needs to know of a format: formats of one kind share code.
template <int64_t kSize, bool kHasOffsets, int kPeriod>
struct GroupKind {
  static constexpr int kQuads = kSize / 4;
  static constexpr bool kOffsets = kHasOffsets;
  static constexpr int kQuadsOfSums = kPeriod;  // after which sums of 16 bits are full
  using Row = Integers<kSize>;
};
template <class Format, class Sums>
using KindOf = GroupKind<Format::kGroup, Format::kZero == 0, Sums::Quads(Format::kMaxCode, Format::kGroup / 4)>;

// Adds the products of kRows rows of x with the codes of a group, four at a time from codes_at, to outputs.
template <class Kind, class Sums, int kRows, typename CodesAt>
LOGPROBD_INLINE void AddGroups(const typename Kind::Row* x, const Scale& w, CodesAt codes_at, Floats (&outputs)[kRows]) {
  Sums sums[kRows][kDigits];
  Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED {
    Repeat<kDigits>([&](auto d) LOGPROBD_UNROLLED { sums[r][d].Start(x[r].start[d]); });
  });
  Repeat<Kind::kQuads>([&](auto q) LOGPROBD_UNROLLED {
    const Words codes = codes_at(q);
    Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED {
      Repeat<kDigits>([&](auto d) LOGPROBD_UNROLLED {
        sums[r][d].Add(codes, &x[r].digits[d][4 * q]);
        if constexpr ((q + 1) % Kind::kQuadsOfSums == 0 && q + 1 < Kind::kQuads) sums[r][d].Widen();
      });
    });
  });
  Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED {
    const Words low = AddIntegers(ShiftLeft(sums[r][1].Total(), 8), sums[r][2].Total());
    const Floats scaled = Mul(ToFloats(low), Fill(x[r].scale));
    const Floats product = Fma(ToFloats(sums[r][0].Total()), Fill(x[r].high_scale), scaled);
    outputs[r] = Fma(product, w.factor, outputs[r]);
    if constexpr (Kind::kOffsets) outputs[r] = Fma(w.offset, Fill(x[r].sum), outputs[r]);
  });
}

// kRows rows of a block of columns. `last` is the end of the blocks that this thread computes.
template <class Format, class Sums, int kRows>
void FewRowsOfIntegers(const Problem& p, int64_t row, int64_t block, int64_t last) {
  Floats outputs[2][kRows];
  Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED { outputs[0][r] = outputs[1][r] = Zeros(); });
  const auto* x = static_cast<const Integers<Format::kGroup>*>(p.x) + row;
  for (int64_t first = 0; first < p.k; first += Format::kGroup, x += p.x_stride) {
    const int64_t ahead = first + kAhead;  // of this block, or of the beginning of the next one
    if (ahead < p.k) {
      Prefetch<Format>(p, block, ahead, Format::kGroup);
    } else if (block + 1 < last) {
      Prefetch<Format>(p, block + 1, std::min(ahead - p.k, p.k - 1), Format::kGroup);
    }
    Repeat<2>([&](auto half) LOGPROBD_UNROLLED {
      const Position<Format> at(p, block, half, first);
      const auto codes_at = [&](int64_t q) LOGPROBD_UNROLLED { return Format::Codes(at.words, at.quad + q); };
      AddGroups<KindOf<Format, Sums>, Sums, kRows>(x, Format::ScaleOf(at.words, at.scales, at.group), codes_at,
                                                   outputs[half]);
    });
  }
  Repeat<2>([&](auto half) LOGPROBD_UNROLLED {
    const int64_t column = block * kColumns + half * kLanes;
    if (column >= p.n) return;
    Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED {
      StoreSome(p.y + (row + r) * p.n + column, p.n - column, outputs[half][r]);
    });
  });
}

// The codes and scales of a chunk of K of a block of columns.
struct UnpackedCodes {
  alignas(64) uint32_t codes[kChunk / 4][kColumns];
  alignas(64) float factors[kChunk / kLanes][kColumns], offsets[kChunk / kLanes][kColumns];  // of each group
};

template <class Format>
void UnpackCodes(const Problem& p, int64_t block, int64_t k, int64_t count, UnpackedCodes& to) {
  for (int64_t group = 0; group < count / Format::kGroup; ++group) {
    for (int64_t half = 0; half < 2; ++half) {
      const Position<Format> at(p, block, half, k + group * Format::kGroup);
      const Scale scale = Format::ScaleOf(at.words, at.scales, at.group);
      Store(&to.factors[group][half * kLanes], scale.factor);
      Store(&to.offsets[group][half * kLanes], scale.offset);
      for (int64_t q = 0; q < Format::kGroup / 4; ++q) {
        StoreWords(&to.codes[group * Format::kGroup / 4 + q][half * kLanes], Format::Codes(at.words, at.quad + q));
      }
    }
  }
}

// Adds some groups of kRows rows to sums [kRows, kColumns]; x is the first group of the first row.
template <class Kind, class Sums, int kRows>
void IntegerTile(const typename Kind::Row* x, int64_t stride, const UnpackedCodes& w, int64_t groups, float* sums) {
  for (int64_t half = 0; half < 2; ++half) {
    Floats outputs[kRows];
    Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED { outputs[r] = Load(sums + r * kColumns + half * kLanes); });
    for (int64_t group = 0; group < groups; ++group) {
      const uint32_t* codes = &w.codes[group * Kind::kQuads][half * kLanes];
      const Scale scale = {Load(&w.factors[group][half * kLanes]), Load(&w.offsets[group][half * kLanes])};
      const auto codes_at = [&](int64_t q) LOGPROBD_UNROLLED { return LoadWords(codes + q * kColumns); };
      AddGroups<Kind, Sums, kRows>(x + group * stride, scale, codes_at, outputs);
    }
    Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED { Store(sums + r * kColumns + half * kLanes, outputs[r]); });
  }
}

template <class Kind>
using IntegerTileOfRows = void (*)(const typename Kind::Row*, int64_t, const UnpackedCodes&, int64_t, float*);

template <class Kind, class Sums, int... kIndex>
const IntegerTileOfRows<Kind>* IntegerTilesOf(std::integer_sequence<int, kIndex...>) {
  static constexpr IntegerTileOfRows<Kind> table[] = {IntegerTile<Kind, Sums, kIndex + 1>...};
  return table;
}

template <class Format, class Sums>
void ManyRowsOfIntegers(const Problem& p, int64_t first, int64_t last) {
  const auto* tile = IntegerTilesOf<KindOf<Format, Sums>, Sums>(std::make_integer_sequence<int, Sums::kTileRows>());
  const auto* x = static_cast<const Integers<Format::kGroup>*>(p.x);
  const int64_t tiles = (p.m + Sums::kTileRows - 1) / Sums::kTileRows;
  const int64_t depth = (p.k + kStep - 1) / kStep * kStep;
  const int64_t together = std::min(p.m <= kCachedRows ? 4 : last - first, last - first);
  const std::unique_ptr<float[]> sums(new float[static_cast<size_t>(together * p.m * kColumns)]);  // of each block
  UnpackedCodes w;
  for (int64_t start = first; start < last; start += together) {
    const int64_t end = std::min(last, start + together);
    std::fill_n(sums.get(), (end - start) * p.m * kColumns, 0.0f);
    for (int64_t from = 0; from < depth; from += kChunk) {
      const int64_t count = std::min(kChunk, depth - from);
      const auto* of_chunk = x + from / Format::kGroup * p.x_stride;
      for (int64_t block = start; block < end; ++block) {
        UnpackCodes<Format>(p, block, from, count, w);
        if (block + 1 < end) {
          Prefetch<Format>(p, block + 1, from, count);
        } else if (from + count < depth) {
          Prefetch<Format>(p, start, from + count, std::min(kChunk, depth - from - count));
        }
        float* of_block = sums.get() + (block - start) * p.m * kColumns;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = p.m * t / tiles, rows = p.m * (t + 1) / tiles - row;
          tile[rows - 1](of_chunk + row, p.x_stride, w, count / Format::kGroup, of_block + row * kColumns);
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

// A Panel. The problem's x is Integers [groups of K, rows].
template <class Format, class Sums>
void RunIntegers(const Problem& p, int64_t first, int64_t last) {
  if (p.m > kFewRows) return ManyRowsOfIntegers<Format, Sums>(p, first, last);
  for (int64_t block = first; block < last; ++block) {
    int64_t row = 0;
    for (; row + 1 < p.m; row += 2) FewRowsOfIntegers<Format, Sums, 2>(p, row, block, last);
    if (row < p.m) FewRowsOfIntegers<Format, Sums, 1>(p, row, block, last);
  }
}

// Makes the Integers [groups of K, m] of a row of x [m, k].
template <class Format>
void FillIntegers(const float* x, int64_t m, int64_t k, int64_t row, Integers<Format::kGroup>* to) {
  const int64_t padded = (k + Format::kBlock - 1) / Format::kBlock * Format::kBlock;
  for (int64_t first = 0; first < padded; first += Format::kGroup, to += m) {
    float group[Format::kGroup] = {};
    std::copy_n(x + row * k + first, std::clamp<int64_t>(k - first, 0, Format::kGroup), group);
    ToIntegers<Format>(group, to[row]);
  }
}

}  // namespace LOGPROBD_NAMESPACE
