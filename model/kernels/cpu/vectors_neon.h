// The operations of vectors.h in four NEON registers.

#pragma once

#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace LOGPROBD_NAMESPACE {

constexpr int kTileRows = 6;     // of the linear map: 24 accumulators of 32 registers
constexpr int kTileColumns = 1;  // vectors of W in a tile
constexpr int kTileVectors = 1;  // of attention, with 6 rows

struct Floats {
  float32x4_t part[4];
};
struct Mask {
  uint32x4_t part[4];  // all bits of a lane set, or none
};

inline bool RunsHere() { return true; }

// Sets this thread to flush denormals and round to nearest; restores its mode on destruction.
class FloatMode {
 public:
  FloatMode() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    Set((saved_ & ~(uint64_t{3} << 22)) | uint64_t{1} << 24);
  }
  ~FloatMode() { Set(saved_); }

 private:
  static void Set(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
  uint64_t saved_;
};

template <typename Operation>
LOGPROBD_INLINE Floats Map(Operation operation) {
  return {{operation(0), operation(1), operation(2), operation(3)}};
}
template <typename Operation>
LOGPROBD_INLINE Mask MapMask(Operation operation) {
  return {{operation(0), operation(1), operation(2), operation(3)}};
}

LOGPROBD_INLINE Floats Fill(float value) {
  return Map([&](int) { return vdupq_n_f32(value); });
}
LOGPROBD_INLINE Floats Zeros() { return Fill(0.0f); }
LOGPROBD_INLINE Floats Add(Floats a, Floats b) {
  return Map([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
}
LOGPROBD_INLINE Floats Sub(Floats a, Floats b) {
  return Map([&](int i) { return vsubq_f32(a.part[i], b.part[i]); });
}
LOGPROBD_INLINE Floats Mul(Floats a, Floats b) {
  return Map([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
}
LOGPROBD_INLINE Floats Div(Floats a, Floats b) {
  return Map([&](int i) { return vdivq_f32(a.part[i], b.part[i]); });
}
LOGPROBD_INLINE Floats Fma(Floats a, Floats b, Floats c) {
  return Map([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
}
LOGPROBD_INLINE Floats NegatedFma(Floats a, Floats b, Floats c) {
  return Map([&](int i) { return vfmsq_f32(c.part[i], a.part[i], b.part[i]); });
}
LOGPROBD_INLINE float32x4_t Greatest(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
LOGPROBD_INLINE Floats Max(Floats a, Floats b) {  // a > b ? a : b
  return Map([&](int i) { return Greatest(a.part[i], b.part[i]); });
}
LOGPROBD_INLINE Floats Abs(Floats a) {
  return Map([&](int i) { return vabsq_f32(a.part[i]); });
}
LOGPROBD_INLINE Floats Round(Floats a) {
  return Map([&](int i) { return vrndnq_f32(a.part[i]); });
}
// a * 2^n for integer n from -126 to 127.
LOGPROBD_INLINE Floats TimesPowerOfTwo(Floats a, Floats n) {
  return Map([&](int i) {
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.part[i]), vdupq_n_s32(127));
    return vmulq_f32(a.part[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  });
}

LOGPROBD_INLINE Mask FirstLanes(int64_t count) {
  static const uint32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const uint32x4_t limit = vdupq_n_u32(static_cast<uint32_t>(std::clamp<int64_t>(count, 0, 16)));
  return MapMask([&](int i) { return vcltq_u32(vld1q_u32(kLane + 4 * i), limit); });
}
LOGPROBD_INLINE Mask Less(Floats a, Floats b) {
  return MapMask([&](int i) { return vcltq_f32(a.part[i], b.part[i]); });
}
LOGPROBD_INLINE Mask Greater(Floats a, Floats b) { return Less(b, a); }
LOGPROBD_INLINE Mask GreaterOrEqual(Floats a, Floats b) {
  return MapMask([&](int i) { return vcgeq_f32(a.part[i], b.part[i]); });
}
LOGPROBD_INLINE Mask Equal(Floats a, Floats b) {
  return MapMask([&](int i) { return vceqq_f32(a.part[i], b.part[i]); });
}
LOGPROBD_INLINE uint32_t Bits(Mask mask) {
  static const uint32_t kBit[4] = {1, 2, 4, 8};
  const uint32x4_t bit = vld1q_u32(kBit);
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= vaddvq_u32(vandq_u32(mask.part[i], bit)) << (4 * i);
  return bits;
}
LOGPROBD_INLINE Floats Choose(Mask mask, Floats yes, Floats no) {
  return Map([&](int i) { return vbslq_f32(mask.part[i], yes.part[i], no.part[i]); });
}

LOGPROBD_INLINE Floats Load(const float* from) {
  return Map([&](int i) { return vld1q_f32(from + 4 * i); });
}
LOGPROBD_INLINE Floats Load(const uint16_t* from) {
  return Map([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from + 4 * i), 16)); });
}
LOGPROBD_INLINE void StoreAll(float* to, Floats value) {
  for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, value.part[i]);
}
LOGPROBD_INLINE void StoreAll(uint16_t* to, Floats value) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value.part[i]), top = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(top, vdupq_n_u32(1));
    const uint32x4_t even = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff)), 16);
    const uint32x4_t number = vceqq_f32(value.part[i], value.part[i]);
    vst1_u16(to + 4 * i, vmovn_u32(vbslq_u32(number, even, vorrq_u32(top, vdupq_n_u32(0x40)))));
  }
}

LOGPROBD_INLINE Floats LoadFloat16(const uint16_t* from) {
  return Map([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4 * i))); });
}

// 16 words of 32 bits.
struct Words {
  uint32x4_t part[4];
};
template <typename Operation>
LOGPROBD_INLINE Words MapWords(Operation operation) {
  return {{operation(0), operation(1), operation(2), operation(3)}};
}

LOGPROBD_INLINE Words LoadWords(const uint32_t* from) {
  return MapWords([&](int i) { return vld1q_u32(from + 4 * i); });
}
LOGPROBD_INLINE void StoreWords(uint32_t* to, Words value) {
  for (int i = 0; i < 4; ++i) vst1q_u32(to + 4 * i, value.part[i]);
}
LOGPROBD_INLINE Words FillWords(uint32_t word) {
  return MapWords([&](int) { return vdupq_n_u32(word); });
}
LOGPROBD_INLINE Words LoadBytes(const uint8_t* from) {
  const uint8x16_t bytes = vld1q_u8(from);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  return {{vmovl_u16(vget_low_u16(low)), vmovl_u16(vget_high_u16(low)), vmovl_u16(vget_low_u16(high)),
           vmovl_u16(vget_high_u16(high))}};
}
LOGPROBD_INLINE Words ShiftLeft(Words a, int64_t bits) {
  const int32x4_t by = vdupq_n_s32(static_cast<int32_t>(bits));
  return MapWords([&](int i) { return vshlq_u32(a.part[i], by); });
}
LOGPROBD_INLINE Words ShiftRight(Words a, int64_t bits) { return ShiftLeft(a, -bits); }
LOGPROBD_INLINE Words ShiftRightSigned(Words a, int bits) {
  return MapWords([&](int i) {
    return vreinterpretq_u32_s32(vshlq_s32(vreinterpretq_s32_u32(a.part[i]), vdupq_n_s32(-bits)));
  });
}
LOGPROBD_INLINE Words And(Words a, uint32_t mask) {
  return MapWords([&](int i) { return vandq_u32(a.part[i], vdupq_n_u32(mask)); });
}
// The same 4 bytes in each word.
LOGPROBD_INLINE uint32x4_t FourBytes(const int8_t* four) {
  uint32_t word;
  std::memcpy(&word, four, sizeof word);
  return vdupq_n_u32(word);
}
LOGPROBD_INLINE Words Xor(Words a, uint32_t mask) {
  return MapWords([&](int i) { return veorq_u32(a.part[i], vdupq_n_u32(mask)); });
}
LOGPROBD_INLINE Words AddIntegers(Words a, Words b) {
  return MapWords([&](int i) { return vaddq_u32(a.part[i], b.part[i]); });
}
LOGPROBD_INLINE Words Or(Words a, Words b) {
  return MapWords([&](int i) { return vorrq_u32(a.part[i], b.part[i]); });
}
// table[byte] of each byte, which is below 16.
LOGPROBD_INLINE Words Lookup(Words bytes, const uint8_t (&table)[16]) {
  const uint8x16_t entries = vld1q_u8(table);
  return MapWords([&](int i) { return vreinterpretq_u32_u8(vqtbl1q_u8(entries, vreinterpretq_u8_u32(bytes.part[i]))); });
}
LOGPROBD_INLINE Floats ToFloats(Words signed_words) {
  return Map([&](int i) { return vcvtq_f32_s32(vreinterpretq_s32_u32(signed_words.part[i])); });
}
LOGPROBD_INLINE Words ToWords(Floats a) {  // to nearest even
  return MapWords([&](int i) { return vreinterpretq_u32_s32(vcvtnq_s32_f32(a.part[i])); });
}
LOGPROBD_INLINE void StoreBytes(int8_t* to, Words a) {  // the lowest byte of each word
  const uint16x8_t low = vcombine_u16(vmovn_u32(a.part[0]), vmovn_u32(a.part[1]));
  const uint16x8_t high = vcombine_u16(vmovn_u32(a.part[2]), vmovn_u32(a.part[3]));
  vst1q_s8(to, vreinterpretq_s8_u8(vcombine_u8(vmovn_u16(low), vmovn_u16(high))));
}
LOGPROBD_INLINE int32_t SumOfIntegers(Words a) {
  const uint32x4_t four = vaddq_u32(vaddq_u32(a.part[0], a.part[1]), vaddq_u32(a.part[2], a.part[3]));
  return static_cast<int32_t>(vaddvq_u32(four));
}
LOGPROBD_INLINE Floats FromBits(Words bits) {
  return Map([&](int i) { return vreinterpretq_f32_u32(bits.part[i]); });
}
// The low or the high half of each word, a float16.
LOGPROBD_INLINE Floats LowFloat16(Words a) {
  return Map([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(a.part[i]))); });
}
LOGPROBD_INLINE Floats HighFloat16(Words a) { return LowFloat16(ShiftRight(a, 16)); }

#if defined(__linux__)
inline bool HasByteDots() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#else
inline bool HasByteDots() { return true; }  // all Apple silicon
#endif

constexpr int MaxCodeOfSums(int max_code) { return max_code > 127 ? 255 : 127; }

// Sums of products of the bytes of codes and signed bytes, 4 in each of 16 columns. Codes above 127 are centered on
// 128 and become signed bytes.
template <class Instruction>
struct SignedSums {
  static constexpr int kTileRows = 2;
  int32_t start;
  Words sums;

  LOGPROBD_INLINE void Start(int32_t value) {
    start = value;
    sums = FillWords(0);
  }
  template <int kMaxCode>
  LOGPROBD_INLINE void Add(int, Words codes, const int8_t* four) {
    if constexpr (kMaxCode > 127) {
      start = 0;
      codes = Xor(codes, 0x80808080);
    }
    const int8x16_t all = vreinterpretq_s8_u32(FourBytes(four));
    for (int i = 0; i < 4; ++i) {
      int32x4_t sum = vreinterpretq_s32_u32(sums.part[i]);
      Instruction::Add(sum, vreinterpretq_s8_u32(codes.part[i]), all);
      sums.part[i] = vreinterpretq_u32_s32(sum);
    }
  }
  LOGPROBD_INLINE Words Total() const { return AddIntegers(sums, FillWords(static_cast<uint32_t>(start))); }
};

struct MultiplyLong {
  static LOGPROBD_INLINE void Add(int32x4_t& sum, int8x16_t codes, int8x16_t digits) {
    const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(digits)), high = vmull_high_s8(codes, digits);
    sum = vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));  // two products can have 17 bits
    __asm__("" : "+w"(sum));  // keeps GCC from holding all products, and adding them last
  }
};
struct DotProduct {  // Armv8.2's sdot
  static LOGPROBD_INLINE void Add(int32x4_t& sum, int8x16_t codes, int8x16_t digits) {
    // Inline assembly: the library needs no separate build with this instruction set.
    __asm__(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(codes), "w"(digits));
  }
};
using ByteSums = SignedSums<MultiplyLong>;
using DotSums = SignedSums<DotProduct>;

// 16 pairs of bfloat16: the first of each, and the second.
struct Pairs {
  Floats first, second;
};

// Lanes i and i + 8, then i + 4, i + 2 and i + 1.
LOGPROBD_INLINE float SumOf(Floats x) {
  const float32x4_t low = vaddq_f32(x.part[2], x.part[0]), high = vaddq_f32(x.part[3], x.part[1]);
  const float32x4_t four = vaddq_f32(high, low), two = vaddq_f32(four, vextq_f32(four, four, 2));
  return vgetq_lane_f32(two, 0) + vgetq_lane_f32(two, 1);
}
LOGPROBD_INLINE float MaxOf(Floats x) {
  const float32x4_t low = Greatest(x.part[2], x.part[0]), high = Greatest(x.part[3], x.part[1]);
  const float32x4_t four = Greatest(high, low), two = Greatest(vextq_f32(four, four, 2), four);
  const float even = vgetq_lane_f32(two, 0), odd = vgetq_lane_f32(two, 1);
  return odd > even ? odd : even;
}

}  // namespace LOGPROBD_NAMESPACE

#include "vectors_parts.h"
