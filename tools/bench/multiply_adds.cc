// Float32 multiply-adds of one thread that need nothing but registers: what products are compared with.

#include "vectors.h"

using namespace LOGPROBD_NAMESPACE;

#if defined(__AVX512F__)
constexpr int64_t kAccumulators = 12;  // enough for the latency of a multiply-add
#else
constexpr int64_t kAccumulators = 6;  // of two or four registers each
#endif

extern "C" {

bool runs_here() { return RunsHere(); }

int64_t operations_per_round() { return 2 * kAccumulators * kLanes; }

float multiply_adds(int64_t rounds, float x) {
  const Floats a = Fill(x), b = Fill(x);
  Floats sums[kAccumulators];
  for (int64_t i = 0; i < kAccumulators; ++i) sums[i] = Fill(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int64_t i = 0; i < kAccumulators; ++i) sums[i] = Fma(a, b, sums[i]);
  }
  float lanes[kLanes], total = 0;
  for (int64_t i = 0; i < kAccumulators; ++i) {
    Store(lanes, sums[i]);
    for (const float lane : lanes) total += lane;
  }
  return total;
}

}  // extern "C"
