// y[M, N] = x[M, K] W[N, K]^T for a packed W, as handlers of XLA's foreign function interface. The layouts of W are in
// formats.h, the arithmetic in tiles.h and integers.h.

#include <algorithm>
#include <cstdint>
#include <vector>

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

bool IsAscending(const int32_t* starts, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i) {
    if (starts[i] > starts[i + 1]) return false;
  }
  return starts[0] == 0 && starts[count] <= end;
}

// y[r] = W_e x[r] for the rows r of x in [starts[e], starts[e + 1]), where W_e is rows [e N, (e + 1) N) of W. A W_e without
// rows is not read.
ffi::Error Experts(ffi::ThreadPool pool, ffi::AnyBuffer x, U32 words, ffi::AnyBuffer scales, S32 starts,
                   ffi::Result<F32> y, std::string_view format) {
  return Guarded([&]() -> ffi::Error {
    const auto xs = x.dimensions(), ys = y->dimensions();
    const int64_t count = static_cast<int64_t>(starts.element_count()) - 1;
    const int32_t* rows = starts.typed_data();
    std::optional<Product> product;
    if (xs.size() == 2 && ys.size() == 2 && xs[0] == ys[0] && ys[1] % kColumns == 0 && count > 0 &&
        IsAscending(rows, count, xs[0])) {
      product = MakeProduct(pool, x, {words, scales, format}, rows[count], count * ys[1]);
    }
    if (!product) {
      return ffi::Error::InvalidArgument(
          "experts takes x [M, K], a packed weight [X N, K] and starts [X + 1], and gives y [M, N]");
    }
    const int64_t n = ys[1], m = rows[count], blocks = n / kColumns, pairs = (blocks + 1) / 2;
    std::fill(y->typed_data() + m * n, y->typed_data() + xs[0] * n, 0.0f);
    std::vector<Problem> used;
    for (int64_t e = 0; e < count; ++e) {
      if (rows[e] == rows[e + 1]) continue;
      Problem part = Columns(product->problem, e * n, n, y->typed_data() + rows[e] * n);
      part.x = static_cast<const char*>(part.x) + rows[e] * part.row_bytes;
      part.m = rows[e + 1] - rows[e];
      used.push_back(part);
    }
    if (used.empty()) return ffi::Error::Success();
    const auto units = static_cast<int64_t>(used.size()) * pairs;
    const int64_t bytes = static_cast<int64_t>(words.size_bytes()) / count * static_cast<int64_t>(used.size());
    const bool alone = bytes < kMinBytesToShare && m <= kMaxRowsAlone;
    const int64_t threads = alone ? 1 : std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), units));
    return Outcome(Share(pool, threads, units, [=, x = product->x, panel = product->panel](int64_t first, int64_t last) {
      const FloatMode mode;
      while (first < last) {
        const int64_t from = first % pairs, to = std::min(pairs, from + last - first);
        panel(used[static_cast<size_t>(first / pairs)], 2 * from, std::min(2 * to, blocks));
        first += to - from;
      }
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_experts, Experts,
                              (Bind<ffi::AnyBuffer, U32, ffi::AnyBuffer, S32>().Ret<F32>().Attr<std::string_view>(
                                  "format")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear_floats, Linear<Path::kFloats>, Binding());

// 1 if this CPU can run this library, and its path "pairs"; else 0.
extern "C" int logprobd_runs_here() { return RunsHere(); }
extern "C" int logprobd_has_pairs() { return HasDots(); }
