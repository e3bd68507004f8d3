// Shared by all x86 builds: floating-point mode, CPU detection, and reductions of half a vector.

#pragma once

#include <cpuid.h>
#include <immintrin.h>

namespace LOGPROBD_NAMESPACE {

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

// Lanes i and i + 4, then i + 2 and i + 1.
LOGPROBD_INLINE float SumOf(__m256 eight) {
  const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(two) + _mm_cvtss_f32(_mm_movehdup_ps(two));
}
LOGPROBD_INLINE float MaxOf(__m256 eight) {
  const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_max_ps(_mm_movehl_ps(four, four), four);
  return _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(two), two));
}

}  // namespace LOGPROBD_NAMESPACE
