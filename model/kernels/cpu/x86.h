// Shared by all x86 builds: floating-point mode and CPU detection.

#pragma once

#include <cpuid.h>
#include <immintrin.h>

namespace logprobd {

// True if this CPU has AVX2 and the older extensions that the compiler may use.
inline bool HasAvx2() {
  unsigned a, b, c, d;
  const bool half_floats = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  return half_floats && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi");
}

// Sets this thread to flush denormals and round to nearest; restores its mode on destruction.
class FloatMode {
 public:
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr((saved_ & ~0x6000u) | 0x8040u); }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

}  // namespace logprobd
