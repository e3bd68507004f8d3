// y[M, N] = x[M, K] W[N, K]^T for bfloat16 x and a packed W, bfloat16 or int8, as handlers of XLA's foreign function
// interface. The layout of W and the arithmetic are in tiles.h.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "handlers.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace {

using namespace logprobd;
using namespace LOGPROBD_NAMESPACE;

constexpr int64_t kMinBytesToShare = 1 << 16;  // reading less of W takes less time than waking a thread
constexpr int64_t kMaxRowsAlone = 16;          // so does the arithmetic of up to this many rows

int64_t Threads(const Problem& p, int64_t in_pool) {
  const int64_t bytes = p.blocks * p.stride * static_cast<int64_t>(sizeof(*p.w));
  if (bytes < kMinBytesToShare && p.m <= kMaxRowsAlone) return 1;
  return std::max<int64_t>(1, std::min(in_pool, p.blocks));
}

// y = x W^T.
ffi::Error Run(TileTable tiles, ffi::ThreadPool pool, Bf16 x, const Weight& weight, Live live, AnyResult y) {
  const auto xs = x.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ys.size() != 2 || xs[0] != ys[0] || !weight.Fits(ys[1], xs[1])) {
    return ffi::Error::InvalidArgument("linear takes x [M, K] and a packed weight [N, K], and gives y [M, N]");
  }
  const bool bf16 = y->element_type() == ffi::BF16;
  if (!bf16 && y->element_type() != ffi::F32) return ffi::Error::InvalidArgument("linear gives bfloat16 or float32");
  // Rows after the live ones are padding: filled with zeros, not computed.
  const int64_t m = std::clamp<int64_t>(*live.typed_data(), 0, xs[0]), row = ys[1] * (bf16 ? 2 : 4);
  std::memset(static_cast<char*>(y->untyped_data()) + m * row, 0, static_cast<size_t>((xs[0] - m) * row));
  if (m == 0) return ffi::Error::Success();
  const Problem problem = weight.MakeProblem(x.typed_data(), y->untyped_data(), bf16, m, ys[1], xs[1]);
  return Outcome(
      Share(pool, Threads(problem, pool.num_threads()), problem.blocks, [problem, tiles](int64_t first, int64_t last) {
        const FloatMode mode;
        for (int64_t block = first; block < last; ++block) Compute(problem, tiles, block, block + 1 < last);
      }));
}

template <TileTable (*kTiles)()>
ffi::Error Linear(ffi::ThreadPool pool, Bf16 x, Bf16 w, Live live, AnyResult y) {
  return Run(kTiles(), pool, x, PairsOf(w), live, y);
}

ffi::Error LinearInt8(ffi::ThreadPool pool, Bf16 x, S8 w, F16 scales, Live live, AnyResult y) {
  return Run(Int8Tiles(), pool, x, Int8Of(w, scales), live, y);
}

auto Binding() { return Bind<Bf16, Bf16, Live>().Ret<ffi::AnyBuffer>(); }

}  // namespace

// The fastest path on this CPU, and each path by name for tests.
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear, Linear<FastestTiles>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear_pairs, Linear<PairTiles>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear_floats, Linear<FloatTiles>, Binding());

XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear_int8, LinearInt8, (Bind<Bf16, S8, F16, Live>().Ret<ffi::AnyBuffer>()));

// 1 if this CPU can run this library, and its path "pairs"; else 0.
extern "C" int logprobd_runs_here() { return RunsHere(); }
extern "C" int logprobd_has_pairs() { return HasPairs(); }
