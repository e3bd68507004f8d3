// y[M, N] = x[M, K] W[N, K]^T for a packed W, as handlers of XLA's foreign function interface. The layouts of W are in
// formats.h, the arithmetic in tiles.h and integers.h.

#include <algorithm>
#include <cstdint>

#include "dots.h"
#include "handlers.h"
#include "parallel.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace {

using namespace logprobd;
using namespace LOGPROBD_NAMESPACE;

constexpr int64_t kMinBytesToShare = 1 << 16;  // reading less of W takes less time than waking a thread
constexpr int64_t kMaxRowsAlone = 16;          // so does the arithmetic of up to this many rows

template <Path kPath>
ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, U32 words, ffi::AnyBuffer scales, Live live,
                  ffi::Result<F32> y, std::string_view format) {
  return Guarded([&]() -> ffi::Error {
    const auto xs = x.dimensions(), ys = y->dimensions();
    const bool fits = xs.size() == 2 && ys.size() == 2 && xs[0] == ys[0];
    // Rows after the live ones are padding: filled with zeros, not computed.
    const int64_t m = fits ? std::clamp<int64_t>(*live.typed_data(), 0, xs[0]) : 0;
    std::optional<Product> product;
    if (fits) product = MakeProduct(pool, x, {words, scales, format}, m, ys[1], kPath);
    if (!product) {
      return ffi::Error::InvalidArgument("linear takes x [M, K] and a packed weight [N, K], and gives y [M, N]");
    }
    product->problem.y = y->typed_data();
    std::fill(y->typed_data() + m * ys[1], y->typed_data() + xs[0] * ys[1], 0.0f);
    if (m == 0) return ffi::Error::Success();
    const auto blocks = words.dimensions()[0], bytes = static_cast<int64_t>(words.size_bytes());
    const bool alone = bytes < kMinBytesToShare && m <= kMaxRowsAlone;
    const int64_t pairs = (blocks + 1) / 2;  // a panel of one row computes two blocks together
    const int64_t threads = alone ? 1 : std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), pairs));
    return Outcome(Share(pool, threads, pairs, [product = *product, blocks](int64_t first, int64_t last) {
      const FloatMode mode;
      product.panel(product.problem, 2 * first, std::min(2 * last, blocks));
    }));
  });
}

auto Binding() {
  return Bind<ffi::AnyBuffer, U32, ffi::AnyBuffer, Live>().Ret<F32>().Attr<std::string_view>("format");
}

}  // namespace

// The fastest path on this CPU, and each path of bfloat16 products by name for tests.
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear, Linear<Path::kFastest>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear_pairs, Linear<Path::kDots>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear_floats, Linear<Path::kFloats>, Binding());

// 1 if this CPU can run this library, and its path "pairs"; else 0.
extern "C" int logprobd_runs_here() { return RunsHere(); }
extern "C" int logprobd_has_pairs() { return HasDots(); }
