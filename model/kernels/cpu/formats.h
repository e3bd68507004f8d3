// Packed weights: the block formats of GGUF files and our own (model/formats.py), and float16, bfloat16 and float32,
// reordered for vectors.
//
// A weight [N, K] is stored as words [ceil(N/32)][ceil(K/B)][W][32] of 32 bits: for each block of B elements of K, W
// words of each of 32 columns, with the bytes of the file in the file's order. Where a block also has a scale that is no
// full word, the scales are in an array of their own, [ceil(N/32)][ceil(K/B)][32]. Columns and K are padded with zeros.
//
// A weight's value is (code - zero) * factor + offset, where the codes are unsigned bytes: `dequantize` of the gguf
// package rounds it to float32, products use it as it is. Factor and offset are exact: a float16 times an integer of 8
// bits at most.
// The layouts of the blocks are those of the ggml project (ggml-common.h and gguf-py/gguf/quants.py).

#pragma once

#include <cstdint>
#include <string_view>
#include <type_traits>

#include "layout.h"
#include "vectors.h"

namespace LOGPROBD_NAMESPACE {

constexpr int64_t kStep = 32;  // elements of K that are read together; every block size is a multiple of it

// What the codes of a group of K have in common, for 16 columns: value = (code - Format::kZero) * factor + offset.
struct Scale {
  Floats factor, offset;
};
LOGPROBD_INLINE Scale Centered(Floats factor) { return {factor, Zeros()}; }

// In the following, `words` points to 16 columns of a block's first word, `scales` to those of the block's scale, and
// `quad` is a position in the block divided by 4. kGroup elements of K have one Scale. Codes gives the codes of 4
// elements of K in the bytes of a word, the first in the lowest; they are kMaxCode at most.

LOGPROBD_INLINE Words WordAt(const uint32_t* words, int64_t index) { return LoadWords(words + index * kColumns); }

// 32 codes of 4 bits in 4 words: 16 in the low halves of their bytes, then 16 in the high halves.
LOGPROBD_INLINE Words Nibbles(const uint32_t* words, int64_t quad) {
  return And(ShiftRight(WordAt(words, quad % 4), quad / 4 * 4), 0x0f0f0f0f);
}

// Bits 4 quad to 4 quad + 3 of a word as bit 4 of each byte.
LOGPROBD_INLINE Words FifthBits(Words word, int64_t quad) {
  const Words bits = And(ShiftRight(word, 4 * quad), 0xf), two = Or(bits, ShiftLeft(bits, 14));
  return ShiftLeft(And(Or(two, ShiftLeft(two, 7)), 0x01010101), 4);
}

// The scales beside the words.
struct NoScales {
  using Scales = uint16_t;
  static constexpr int64_t kScaleBytes = 0;
};
struct Float16Scales {
  using Scales = uint16_t;
  static constexpr int64_t kScaleBytes = 2;
};

struct Q4_0 : Float16Scales {
  static constexpr int kZero = 8, kMaxCode = 15;
  static constexpr int64_t kBlock = 32, kWords = 4, kGroup = 32;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t*, const Scales* scales, int64_t) {
    return Centered(LoadFloat16(scales));
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) { return Nibbles(words, quad); }
};

struct Q4_1 : NoScales {
  static constexpr int kZero = 0, kMaxCode = 15;
  static constexpr int64_t kBlock = 32, kWords = 5, kGroup = 32;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t* words, const Scales*, int64_t) {
    return {LowFloat16(WordAt(words, 0)), HighFloat16(WordAt(words, 0))};
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) { return Nibbles(words + kColumns, quad); }
};

struct Q5_0 : Float16Scales {
  static constexpr int kZero = 16, kMaxCode = 31;
  static constexpr int64_t kBlock = 32, kWords = 5, kGroup = 32;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t*, const Scales* scales, int64_t) {
    return Centered(LoadFloat16(scales));
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) {
    return Or(Nibbles(words + kColumns, quad), FifthBits(WordAt(words, 0), quad));
  }
};

struct Q5_1 : NoScales {
  static constexpr int kZero = 0, kMaxCode = 31;
  static constexpr int64_t kBlock = 32, kWords = 6, kGroup = 32;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t* words, const Scales* scales, int64_t group) {
    return Q4_1::ScaleOf(words, scales, group);
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) { return Q5_0::Codes(words + kColumns, quad); }
};

struct Q8_0 : Float16Scales {
  static constexpr int kZero = 128, kMaxCode = 255;
  static constexpr int64_t kBlock = 32, kWords = 8, kGroup = 32;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t*, const Scales* scales, int64_t) {
    return Centered(LoadFloat16(scales));
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) {
    return Xor(WordAt(words, quad), 0x80808080);  // signed: 128 more
  }
};

struct Iq4Nl : Float16Scales {
  static constexpr int kZero = 128, kMaxCode = 241;
  static constexpr int64_t kBlock = 32, kWords = 4, kGroup = 32;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t*, const Scales* scales, int64_t) {
    return Centered(LoadFloat16(scales));
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) {
    static constexpr uint8_t kValues[16] = {1,   24,  45,  63,  79,  93,  106, 118,  // 128 more
                                            129, 141, 153, 166, 181, 197, 217, 241};
    return Lookup(Nibbles(words, quad), kValues);
  }
};

struct Iq4Xs : NoScales {
  static constexpr int kZero = 128, kMaxCode = 241;
  static constexpr int64_t kBlock = 256, kWords = 34, kGroup = 32;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t* words, const Scales*, int64_t group) {
    const Words first = WordAt(words, 0);
    const Words low = And(ShiftRight(WordAt(words, 1), 4 * group), 0xf);
    const Words high = ShiftLeft(And(ShiftRight(first, 16 + 2 * group), 3), 4);
    return Centered(Mul(LowFloat16(first), Sub(ToFloats(Or(low, high)), Fill(32))));
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) {
    return Iq4Nl::Codes(words + (2 + quad / 8 * 4) * kColumns, quad % 8);
  }
};

struct Mxfp4 {
  using Scales = uint8_t;  // exponents
  static constexpr int64_t kScaleBytes = 1;
  static constexpr int kZero = 12, kMaxCode = 24;
  static constexpr int64_t kBlock = 32, kWords = 4, kGroup = 32;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t*, const Scales* scales, int64_t) {
    // 2^(e - 128); the two smallest exponents are denormal, which counts as zero.
    const Floats exponents = ToFloats(LoadBytes(scales));
    const Floats normal = FromBits(ShiftLeft(LoadBytes(scales), 23));  // 2^(e - 127), or 0
    return Centered(Choose(Less(exponents, Fill(2)), Zeros(), Mul(normal, Fill(0.5f))));
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) {
    static constexpr uint8_t kValues[16] = {12, 13, 14, 15, 16, 18, 20, 24,  // 12 more than twice the value
                                            12, 11, 10, 9,  8,  6,  4,  0};
    return Lookup(Nibbles(words, quad), kValues);
  }
};

// Blocks of our own: a word with a scale of at most 11 significant bits as float32, its lowest 13 bits the zero point.
// The offset is what the zero point differs from kZero, so that it is 0 in symmetric formats.
template <int kCenter>
LOGPROBD_INLINE Scale ScaleWithZeroPoint(const uint32_t* words) {
  const Words first = WordAt(words, 0);
  const Floats factor = FromBits(And(first, 0xffffe000));
  return {factor, Mul(factor, Sub(Fill(kCenter), ToFloats(And(first, 0x1fff))))};
}

template <int64_t kSize>
struct Int4 : NoScales {
  static constexpr int kZero = 8, kMaxCode = 15;
  static constexpr int64_t kBlock = kSize, kWords = 1 + kSize / 8, kGroup = 32;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t* words, const Scales*, int64_t) {
    return ScaleWithZeroPoint<kZero>(words);
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) {
    return Nibbles(words + (1 + quad / 8 * 4) * kColumns, quad % 8);
  }
};

template <int64_t kSize>
struct Int8 : NoScales {
  static constexpr int kZero = 128, kMaxCode = 255;
  static constexpr int64_t kBlock = kSize, kWords = 1 + kSize / 4, kGroup = 32;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t* words, const Scales*, int64_t) {
    return ScaleWithZeroPoint<kZero>(words);
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) {
    return Q8_0::Codes(words + kColumns, quad);
  }
};

// 256 codes of 2 bits in 16 words: for each half of the block 8 words, and for each 32 elements of it 2 bits.
LOGPROBD_INLINE Words TwoBits(const uint32_t* words, int64_t quad) {
  return And(ShiftRight(WordAt(words, quad / 32 * 8 + quad % 8), quad % 32 / 8 * 2), 0x03030303);
}

struct Q2K : NoScales {
  static constexpr int kZero = 0, kMaxCode = 3;
  static constexpr int64_t kBlock = 256, kWords = 21, kGroup = 16;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t* words, const Scales*, int64_t group) {
    const Words both = ShiftRight(WordAt(words, group / 4), group % 4 * 8), factors = WordAt(words, 20);
    const Floats factor = ToFloats(And(both, 0xf)), minimum = ToFloats(And(ShiftRight(both, 4), 0xf));
    return {Mul(LowFloat16(factors), factor), Sub(Zeros(), Mul(HighFloat16(factors), minimum))};
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) { return TwoBits(words + 4 * kColumns, quad); }
};

struct Q3K : Float16Scales {
  static constexpr int kZero = 4, kMaxCode = 7;
  static constexpr int64_t kBlock = 256, kWords = 27, kGroup = 16;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t* words, const Scales* scales, int64_t group) {
    const Words low = And(ShiftRight(WordAt(words, 24 + group % 8 / 4), group % 4 * 8 + group / 8 * 4), 0xf);
    const Words high = ShiftLeft(And(ShiftRight(WordAt(words, 26), group % 4 * 8 + group / 4 * 2), 3), 4);
    return Centered(Mul(LoadFloat16(scales), Sub(ToFloats(Or(low, high)), Fill(32))));
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) {
    const Words high = And(ShiftRight(WordAt(words, quad % 8), quad / 8), 0x01010101);
    return Or(TwoBits(words + 8 * kColumns, quad), ShiftLeft(high, 2));
  }
};

struct Q4K : NoScales {
  static constexpr int kZero = 0, kMaxCode = 15;
  static constexpr int64_t kBlock = 256, kWords = 36, kGroup = 32;
  // The 6-bit factor and minimum of a group are in words 1 to 3.
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t* words, const Scales*, int64_t group) {
    const Words factors = WordAt(words, 0), a = WordAt(words, 1), b = WordAt(words, 2), c = WordAt(words, 3);
    const int64_t byte = group % 4 * 8;
    Words factor, minimum;
    if (group < 4) {
      factor = And(ShiftRight(a, byte), 63);
      minimum = And(ShiftRight(b, byte), 63);
    } else {
      factor = Or(And(ShiftRight(c, byte), 0xf), And(ShiftRight(a, byte + 2), 0x30));
      minimum = Or(And(ShiftRight(c, byte + 4), 0xf), And(ShiftRight(b, byte + 2), 0x30));
    }
    return {Mul(LowFloat16(factors), ToFloats(factor)),
            Sub(Zeros(), Mul(HighFloat16(factors), ToFloats(minimum)))};
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) {
    const Words both = WordAt(words, 4 + quad / 16 * 8 + quad % 8);
    return And(ShiftRight(both, quad % 16 / 8 * 4), 0x0f0f0f0f);
  }
};

struct Q5K : NoScales {
  static constexpr int kZero = 0, kMaxCode = 31;
  static constexpr int64_t kBlock = 256, kWords = 44, kGroup = 32;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t* words, const Scales* scales, int64_t group) {
    return Q4K::ScaleOf(words, scales, group);
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) {
    const Words high = And(ShiftRight(WordAt(words, 4 + quad % 8), quad / 8), 0x01010101);
    return Or(Q4K::Codes(words + 8 * kColumns, quad), ShiftLeft(high, 4));
  }
};

struct Q6K : Float16Scales {
  static constexpr int kZero = 32, kMaxCode = 63;
  static constexpr int64_t kBlock = 256, kWords = 52, kGroup = 16;
  static LOGPROBD_INLINE Scale ScaleOf(const uint32_t* words, const Scales* scales, int64_t group) {
    const Words byte = And(ShiftRight(WordAt(words, 48 + group / 4), group % 4 * 8), 0xff);
    const Floats factor = Sub(ToFloats(Xor(byte, 0x80)), Fill(128));  // signed
    return Centered(Mul(LoadFloat16(scales), factor));
  }
  static LOGPROBD_INLINE Words Codes(const uint32_t* words, int64_t quad) {
    const int64_t half = quad / 32, part = quad % 32 / 8;  // of the block: 128 elements, and 32 of them
    const Words low = ShiftRight(WordAt(words, 16 * half + part % 2 * 8 + quad % 8), part / 2 * 4);
    return Or(And(low, 0x0f0f0f0f), ShiftLeft(TwoBits(words + 32 * kColumns, quad), 4));
  }
};

// Formats without codes. Values gives 4 elements of K.

struct BFloat16 : NoScales {
  static constexpr int64_t kBlock = 32, kWords = 16, kGroup = 32;
  static LOGPROBD_INLINE void Values(const uint32_t* words, int64_t quad, Floats (&w)[4]) {
    for (int64_t pair = 0; pair < 2; ++pair) {
      const Words both = WordAt(words, 2 * quad + pair);
      w[2 * pair] = FromBits(ShiftLeft(both, 16));
      w[2 * pair + 1] = FromBits(And(both, 0xffff0000));
    }
  }
};

struct Float16 : NoScales {
  static constexpr int64_t kBlock = 32, kWords = 16, kGroup = 32;
  static LOGPROBD_INLINE void Values(const uint32_t* words, int64_t quad, Floats (&w)[4]) {
    for (int64_t pair = 0; pair < 2; ++pair) {
      const Words both = WordAt(words, 2 * quad + pair);
      w[2 * pair] = LowFloat16(both);
      w[2 * pair + 1] = HighFloat16(both);
    }
  }
};

struct Float32 : NoScales {
  static constexpr int64_t kBlock = 32, kWords = 32, kGroup = 32;
  static LOGPROBD_INLINE void Values(const uint32_t* words, int64_t quad, Floats (&w)[4]) {
    for (int64_t i = 0; i < 4; ++i) w[i] = FromBits(WordAt(words, 4 * quad + i));
  }
};

// A word with a float32 scale, then floats of 8 bits (e4m3).
struct Fp8 : NoScales {
  static constexpr int64_t kBlock = 128, kWords = 33, kGroup = 32;
  static LOGPROBD_INLINE void Values(const uint32_t* words, int64_t quad, Floats (&w)[4]) {
    // With the bits of a float16 the value is 2^8 times smaller.
    const Floats scale = Mul(FromBits(WordAt(words, 0)), Fill(256));
    const Words codes = WordAt(words, 1 + quad);
    for (int64_t odd = 0; odd < 2; ++odd) {
      const Words pair = ShiftRight(codes, 8 * odd);
      const Words halves = Or(ShiftLeft(And(pair, 0x00800080), 8), ShiftLeft(And(pair, 0x007f007f), 7));
      w[odd] = Mul(LowFloat16(halves), scale);
      w[2 + odd] = Mul(HighFloat16(halves), scale);
    }
  }
};

template <class Format>
constexpr bool kIsFloat = std::is_same_v<Format, BFloat16> || std::is_same_v<Format, Float16> ||
                          std::is_same_v<Format, Float32> || std::is_same_v<Format, Fp8>;

// Whether a format has offsets. Without them every Scale is Centered.
template <class Format>
constexpr bool kHasOffsets = Format::kZero == 0;
template <int64_t kSize>
constexpr bool kHasOffsets<Int4<kSize>> = true;
template <int64_t kSize>
constexpr bool kHasOffsets<Int8<kSize>> = true;

// Calls use(format) with the format of this name, as in `model/formats.py`; returns false for another name.
template <typename Use>
bool WithFormat(std::string_view name, Use use) {
  const auto matches = [&](std::string_view known, auto format) {
    if (name != known) return false;
    use(format);
    return true;
  };
  return matches("Q4_0", Q4_0()) || matches("Q4_1", Q4_1()) || matches("Q5_0", Q5_0()) || matches("Q5_1", Q5_1()) ||
         matches("Q8_0", Q8_0()) || matches("Q2_K", Q2K()) || matches("Q3_K", Q3K()) || matches("Q4_K", Q4K()) ||
         matches("Q5_K", Q5K()) || matches("Q6_K", Q6K()) || matches("IQ4_NL", Iq4Nl()) ||
         matches("IQ4_XS", Iq4Xs()) || matches("MXFP4", Mxfp4()) || matches("BF16", BFloat16()) ||
         matches("F16", Float16()) || matches("F32", Float32()) || matches("INT4_32", Int4<32>()) ||
         matches("INT4_64", Int4<64>()) || matches("INT4_128", Int4<128>()) || matches("INT8_32", Int8<32>()) ||
         matches("INT8_128", Int8<128>()) || matches("FP8_128", Fp8());
}

}  // namespace LOGPROBD_NAMESPACE
