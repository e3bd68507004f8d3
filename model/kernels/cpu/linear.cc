// y[M, N] = x[M, K] W[N, K]^T for bfloat16 x and packed bfloat16 W, as handlers of XLA's foreign function interface.
// tiles.h has the layout of W, the arithmetic and its promise; parallel.h shares a call among XLA's own threads.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "tiles.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int64_t kMinBytesToShare = 1 << 16;  // waking a thread takes longer than reading less of W than this
constexpr int64_t kMaxRowsAlone = 16;          // or than the arithmetic of so few rows

int64_t Threads(const Problem& p, int64_t in_pool) {
  const int64_t bytes = p.blocks * p.pairs * kPair * static_cast<int64_t>(sizeof(*p.w));
  if (bytes < kMinBytesToShare && p.m <= kMaxRowsAlone) return 1;
  return std::max<int64_t>(1, std::min(in_pool, p.blocks));
}

ffi::Error Run(TileTable tiles, ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> w,
               ffi::BufferR0<ffi::S32> live, ffi::Result<ffi::AnyBuffer> y) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 4 || ys.size() != 2 || ws[2] != kColumns || ws[3] != 2 || xs[0] != ys[0] ||
      (xs[1] + 1) / 2 != ws[1] || (ys[1] + kColumns - 1) / kColumns != ws[0]) {
    return ffi::Error::InvalidArgument("linear takes x [M, K], w [ceil(N/32), ceil(K/2), 32, 2] and gives y [M, N]");
  }
  const bool bf16 = y->element_type() == ffi::BF16;
  if (!bf16 && y->element_type() != ffi::F32) return ffi::Error::InvalidArgument("linear gives bfloat16 or float32");
  // Rows past the live ones are padding: they are zeros, and cost no more than that.
  const int64_t m = std::clamp<int64_t>(*live.typed_data(), 0, xs[0]), row = ys[1] * (bf16 ? 2 : 4);
  std::memset(static_cast<char*>(y->untyped_data()) + m * row, 0, static_cast<size_t>((xs[0] - m) * row));
  if (m == 0) return ffi::Error::Success();
  const Problem problem = {reinterpret_cast<const uint16_t*>(x.typed_data()),
                           reinterpret_cast<const uint16_t*>(w.typed_data()),
                           y->untyped_data(), bf16, m, ys[1], xs[1], ws[1], ws[0]};
  Share(pool, Threads(problem, pool.num_threads()), ws[0], [problem, tiles](int64_t first, int64_t last) {
    const FloatMode mode;
    for (int64_t block = first; block < last; ++block) Compute(problem, tiles, block, block + 1 < last);
  });
  return ffi::Error::Success();
}

template <TileTable (*kTiles)()>
ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> w,
                  ffi::BufferR0<ffi::S32> live, ffi::Result<ffi::AnyBuffer> y) {
  return Run(kTiles(), pool, x, w, live, y);
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::BF16>>()
      .Arg<ffi::Buffer<ffi::BF16>>()
      .Arg<ffi::BufferR0<ffi::S32>>()
      .Ret<ffi::AnyBuffer>();
}

}  // namespace

// The path that is fastest on this CPU, and each path by its name, which the tests compare.
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear, Linear<FastestTiles>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear_pairs, Linear<PairTiles>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear_floats, Linear<FloatTiles>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear_portable, Linear<PortableTiles>, Binding());

// Whether the CPU can run the paths "pairs" and "floats": 1 or 0.
extern "C" int logprobd_has_pairs() { return HasPairs(); }
extern "C" int logprobd_has_floats() { return HasFloats(); }
