// Products with the formats of codes, by sums of integers: those are exact in any order.
//
// The elements of a group of K in a row of x (Format::kGroup of them) become integers of 24 bits and a power of two, so
// an element as large as the group's largest one keeps 22 or 23 of its 24 bits. An integer is split into digits, whose
// products with the codes are added as integers of 32 bits. Their sum, rounded to float32 once, is multiplied by
// the group's factor and added to the output. A weight's value is that of formats.h before it is rounded:
// code * factor + offset.
//
// Determinism: the sum of a group has one value, and groups are added in ascending order, each by the same steps.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "formats.h"
#include "tiles.h"
#include "vectors.h"

namespace LOGPROBD_NAMESPACE {

// A group of K in a row of x: x[i] = scale * integer[i], rounded.
struct RowGroup {
  int32_t high_start, low_start;  // where sums start: minus kZero times the sum of the integers, as 65536 * high + low
  float scale, high_scale, sum;   // high_scale = 65536 * scale; sum of the elements
};

// The digits of 256 as signed bytes, the highest first.
template <int64_t kSize>
struct ByteDigits : RowGroup {
  static constexpr int kDigits = 3;
  int8_t digits[kDigits][kSize];

  LOGPROBD_INLINE void Set(int64_t first, Words integers) {
    const Words bytes = Xor(AddIntegers(integers, FillWords(0x808080)), 0x808080);
    for (int d = 0; d < kDigits; ++d) StoreBytes(&digits[d][first], ShiftRight(bytes, 8 * (kDigits - 1 - d)));
  }
};

// The sums of a group: high and low, 65536 * high + low.
template <class Sums, int64_t kSize>
struct ByteDigitSums {
  using Row = ByteDigits<kSize>;
  using Codes = Words;
  static constexpr int kTileRows = Sums::kTileRows;
  Sums sums[Row::kDigits];

  static constexpr int64_t kCodeWords = 1;
  static LOGPROBD_INLINE Words Split(Words codes) { return codes; }
  static LOGPROBD_INLINE Words LoadCodes(const uint32_t* from) { return LoadWords(from); }
  static LOGPROBD_INLINE void StoreCodes(uint32_t* to, Words codes) { StoreWords(to, codes); }

  LOGPROBD_INLINE void Start(const Row& x) {
    sums[0].Start(x.high_start);
    sums[1].Start(0);
    sums[2].Start(x.low_start);
  }
  template <int kMaxCode>
  LOGPROBD_INLINE void Add(int quad, Words codes, const Row& x) {
    Repeat<Row::kDigits>([&](auto d) LOGPROBD_UNROLLED {
      sums[d].template Add<kMaxCode>(quad, codes, &x.digits[d][4 * quad]);
    });
  }
  LOGPROBD_INLINE Words High() const { return sums[0].Total(); }
  LOGPROBD_INLINE Words Low() const { return AddIntegers(ShiftLeft(sums[1].Total(), 8), sums[2].Total()); }
};

#if defined(__AVX2__) && !defined(__AVX512F__)

// A low digit of 16 bits and a high one, for codes whose products with bytes have more than 16 bits. Of each 4 elements
// of K, the second and third are exchanged.
template <int64_t kSize>
struct WordDigits : RowGroup {
  int16_t digits[2][kSize];

  LOGPROBD_INLINE void Set(int64_t first, Words integers) {
    const Words low = ShiftRightSigned(ShiftLeft(integers, 16), 16);
    StoreExchanged(&digits[0][first], ShiftRightSigned(SubIntegers(integers, low), 16));
    StoreExchanged(&digits[1][first], low);
  }
};

template <int64_t kSize>
struct WordDigitSums {
  using Row = WordDigits<kSize>;
  struct Codes {
    Words even, odd;
  };
  static constexpr int kTileRows = 3;
  static constexpr int64_t kCodeWords = 2;
  Words sums[2];

  static LOGPROBD_INLINE Codes Split(Words codes) {
    return {And(codes, 0x00ff00ff), And(ShiftRight(codes, 8), 0x00ff00ff)};
  }
  static LOGPROBD_INLINE Codes LoadCodes(const uint32_t* from) { return {LoadWords(from), LoadWords(from + kLanes)}; }
  static LOGPROBD_INLINE void StoreCodes(uint32_t* to, Codes codes) {
    StoreWords(to, codes.even);
    StoreWords(to + kLanes, codes.odd);
  }
  LOGPROBD_INLINE void Start(const Row& x) {
    sums[0] = FillWords(static_cast<uint32_t>(x.high_start));
    sums[1] = FillWords(static_cast<uint32_t>(x.low_start));
  }
  template <int>
  LOGPROBD_INLINE void Add(int quad, Codes codes, const Row& x) {
    Repeat<2>([&](auto d) LOGPROBD_UNROLLED {
      AddPairs(sums[d], codes.even, &x.digits[d][4 * quad]);
      AddPairs(sums[d], codes.odd, &x.digits[d][4 * quad + 2]);
    });
  }
  LOGPROBD_INLINE Words High() const { return sums[0]; }
  LOGPROBD_INLINE Words Low() const { return sums[1]; }
};

#endif

// What the arithmetic needs to know of a format: formats of one kind share code.
template <int64_t kSize, bool kHasOffsets, int kMax>
struct GroupKind {
  static constexpr int64_t kGroup = kSize;
  static constexpr int kQuads = kSize / 4, kMaxCode = kMax;
  static constexpr bool kOffsets = kHasOffsets;
};
template <class Format>
using KindOf = GroupKind<Format::kGroup, kHasOffsets<Format>, MaxCodeOfSums(Format::kMaxCode)>;

// How sums are computed, with equal results: on all CPUs of an instruction set, and on those with HasByteDots().
template <class Kind>
struct SumsOf {
#if defined(__AVX512F__)
  using Portable = ByteDigitSums<ByteSums, Kind::kGroup>;
  using Fastest = Portable;
#elif defined(__AVX2__)
  using Bytes = ByteDigitSums<ByteSums, Kind::kGroup>;
  using Portable = std::conditional_t<Kind::kMaxCode <= 63, Bytes, WordDigitSums<Kind::kGroup>>;
  using Fastest = Portable;
#else
  using Portable = ByteDigitSums<ByteSums, Kind::kGroup>;
  using Fastest = ByteDigitSums<DotSums, Kind::kGroup>;
#endif
};
template <class Format>
using RowOf = typename SumsOf<KindOf<Format>>::Portable::Row;

// The largest integer whose digits are bytes: 127 * (65536 + 256 + 1).
constexpr float kMaxInteger = 8355711;

template <class Format>
void ToIntegers(const float* x, RowOf<Format>& to) {
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
  Words total = FillWords(0);
  for (int v = 0; v < kVectors; ++v) {
    const Words integers = ToWords(Mul(values[v], Fill(factor)));
    to.Set(v * kLanes, integers);
    total = AddIntegers(total, integers);
  }
  const int32_t sum = SumOfIntegers(total);
  const int64_t start = -int64_t{Format::kZero} * sum;
  to.high_start = static_cast<int32_t>(start >> 16);
  to.low_start = static_cast<int32_t>(start & 0xffff);
  to.scale = scale + SumOf(zeros);
  to.high_scale = 65536 * to.scale;
  to.sum = static_cast<float>(sum) * to.scale;
}

// Makes the groups [groups of K, m] of a row of x [m, k].
template <class Format>
void FillIntegers(const float* x, int64_t m, int64_t k, int64_t row, RowOf<Format>* to) {
  for (int64_t first = 0; first < DepthOf(k); first += Format::kGroup, to += m) {
    float group[Format::kGroup] = {};
    const int64_t begin = std::min(first, k), end = std::min(first + Format::kGroup, k);
    std::copy(x + row * k + begin, x + row * k + end, group);
    ToIntegers<Format>(group, to[row]);
  }
}

// Adds the products of kRows rows of x with the codes of a group, four at a time from codes_at, to outputs.
template <class Kind, class Sums, int kRows, typename CodesAt>
LOGPROBD_INLINE void AddGroups(const typename Sums::Row* x, const Scale& w, CodesAt codes_at,
                               Floats (&outputs)[kRows]) {
  Sums sums[kRows];
  Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED { sums[r].Start(x[r]); });
  Repeat<Kind::kQuads>([&](auto q) LOGPROBD_UNROLLED {
    const typename Sums::Codes codes = codes_at(q);
    Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED { sums[r].template Add<Kind::kMaxCode>(q, codes, x[r]); });
  });
  Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED {
    // Both parts are exact in float32, whatever the digits were.
    const Words low = sums[r].Low(), high = AddIntegers(sums[r].High(), ShiftRightSigned(low, 16));
    const Floats scaled = Mul(ToFloats(And(low, 0xffff)), Fill(x[r].scale));
    outputs[r] = Fma(Fma(ToFloats(high), Fill(x[r].high_scale), scaled), w.factor, outputs[r]);
    if constexpr (Kind::kOffsets) outputs[r] = Fma(w.offset, Fill(x[r].sum), outputs[r]);
  });
}

// kRows rows of a block of columns. `last` is the end of the blocks that this thread computes.
template <class Format, class Sums, int kRows>
void FewRowsOfIntegers(const Problem& p, int64_t row, int64_t block, int64_t last) {
  Floats outputs[2][kRows];
  Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED { outputs[0][r] = outputs[1][r] = Zeros(); });
  const auto* x = static_cast<const typename Sums::Row*>(p.x) + row;
  for (int64_t first = 0; first < DepthOf(p.k); first += Format::kGroup, x += p.x_stride) {
    const int64_t ahead = first + kAhead;  // of this block, or of the beginning of the next one
    if (ahead < p.k) {
      Prefetch<Format>(p, block, ahead, Format::kGroup);
    } else if (block + 1 < last) {
      Prefetch<Format>(p, block + 1, std::min(ahead - p.k, p.k - 1), Format::kGroup);
    }
    Repeat<2>([&](auto half) LOGPROBD_UNROLLED {
      const Position<Format> at(p, block, half, first);
      const auto codes_at = [&](int64_t q) LOGPROBD_UNROLLED {
        return Sums::Split(Format::Codes(at.words, at.quad + q));
      };
      AddGroups<KindOf<Format>, Sums, kRows>(x, Format::ScaleOf(at.words, at.scales, at.group), codes_at,
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
template <class Sums>
struct UnpackedCodes {
  alignas(64) uint32_t codes[kChunk / 4][2][Sums::kCodeWords * kLanes];
  alignas(64) float factors[kChunk / kLanes][kColumns], offsets[kChunk / kLanes][kColumns];  // of each group
};

template <class Format, class Sums>
void UnpackCodes(const Problem& p, int64_t block, int64_t k, int64_t count, UnpackedCodes<Sums>& to) {
  for (int64_t group = 0; group < count / Format::kGroup; ++group) {
    for (int64_t half = 0; half < 2; ++half) {
      const Position<Format> at(p, block, half, k + group * Format::kGroup);
      const Scale scale = Format::ScaleOf(at.words, at.scales, at.group);
      Store(&to.factors[group][half * kLanes], scale.factor);
      if constexpr (kHasOffsets<Format>) Store(&to.offsets[group][half * kLanes], scale.offset);
      for (int64_t q = 0; q < Format::kGroup / 4; ++q) {
        uint32_t* codes = to.codes[group * Format::kGroup / 4 + q][half];
        Sums::StoreCodes(codes, Sums::Split(Format::Codes(at.words, at.quad + q)));
      }
    }
  }
}

// Adds some groups of kRows rows to sums [kRows, kColumns]; x is the first group of the first row.
template <class Kind, class Sums, int kRows>
void IntegerTile(const typename Sums::Row* x, int64_t stride, const UnpackedCodes<Sums>& w, int64_t groups,
                 float* sums) {
  for (int64_t half = 0; half < 2; ++half) {
    Floats outputs[kRows];
    Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED { outputs[r] = Load(sums + r * kColumns + half * kLanes); });
    for (int64_t group = 0; group < groups; ++group) {
      const auto* codes = &w.codes[group * Kind::kQuads];
      const Scale scale = {Load(&w.factors[group][half * kLanes]),
                           Kind::kOffsets ? Load(&w.offsets[group][half * kLanes]) : Zeros()};
      const auto codes_at = [&](int64_t q) LOGPROBD_UNROLLED { return Sums::LoadCodes(codes[q][half]); };
      AddGroups<Kind, Sums, kRows>(x + group * stride, scale, codes_at, outputs);
    }
    Repeat<kRows>([&](auto r) LOGPROBD_UNROLLED { Store(sums + r * kColumns + half * kLanes, outputs[r]); });
  }
}

template <class Sums>
using IntegerTileOfRows = void (*)(const typename Sums::Row*, int64_t, const UnpackedCodes<Sums>&, int64_t, float*);

template <class Kind, class Sums, int... kIndex>
const IntegerTileOfRows<Sums>* IntegerTilesOf(std::integer_sequence<int, kIndex...>) {
  static constexpr IntegerTileOfRows<Sums> table[] = {IntegerTile<Kind, Sums, kIndex + 1>...};
  return table;
}

template <class Format, class Sums>
void ManyRowsOfIntegers(const Problem& p, int64_t first, int64_t last) {
  const auto* tile = IntegerTilesOf<KindOf<Format>, Sums>(std::make_integer_sequence<int, Sums::kTileRows>());
  const auto* x = static_cast<const typename Sums::Row*>(p.x);
  UnpackedCodes<Sums> w;
  ForEachTile<Format, Sums::kTileRows>(
      p, first, last, [](int64_t, int64_t) {},
      [&](int64_t block, int64_t from, int64_t count) { UnpackCodes<Format, Sums>(p, block, from, count, w); },
      [&](int64_t row, int64_t rows, int64_t from, int64_t count, float* sums) {
        const auto* of_tile = x + from / Format::kGroup * p.x_stride + row;
        tile[rows - 1](of_tile, p.x_stride, w, count / Format::kGroup, sums);
      });
}

// A Panel. The problem's x is RowOf<Format> [groups of K, rows].
template <class Format, class Sums = typename SumsOf<KindOf<Format>>::Portable>
void RunIntegers(const Problem& p, int64_t first, int64_t last) {
  static_assert(Format::kMaxCode <= 127 || Format::kZero == 128, "signed sums of such codes are centered on 128");
  if (p.m > kFewRows) return ManyRowsOfIntegers<Format, Sums>(p, first, last);
  for (int64_t block = first; block < last; ++block) {
    int64_t row = 0;
    for (; row + 1 < p.m; row += 2) FewRowsOfIntegers<Format, Sums, 2>(p, row, block, last);
    if (row < p.m) FewRowsOfIntegers<Format, Sums, 1>(p, row, block, last);
  }
}

}  // namespace LOGPROBD_NAMESPACE
