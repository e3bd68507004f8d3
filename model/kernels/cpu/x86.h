// What all x86 CPUs share here: their control word, and how they tell what they can do.

#pragma once

#include <cpuid.h>
#include <immintrin.h>

namespace logprobd {

// Whether this CPU has what came with AVX2 or before it, and all of which the compiler may use.
inline bool HasAvx2() {
  unsigned a, b, c, d;
  const bool half_floats = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  return half_floats && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi");
}

// Flushes denormals and rounds to nearest on this thread while it lives, whatever the thread was set to.
class FloatMode {
 public:
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr((saved_ & ~0x6000u) | 0x8040u); }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

}  // namespace logprobd
