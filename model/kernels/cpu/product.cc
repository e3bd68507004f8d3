// The panels of all formats, and the choice among them.

#include "product.h"

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

#include "dots.h"
#include "integers.h"
#include "parallel.h"

namespace LOGPROBD_NAMESPACE {

namespace {

// Rows of x as a panel reads them.
struct Rows {
  std::shared_ptr<const void> data;
  int64_t stride, bytes;  // as in Problem
};

struct Layout {
  int64_t block, words, scale_bytes;
  Panel panel;
  Rows (*integers)(ffi::ThreadPool pool, const float* x, int64_t m, int64_t k);  // null for float32 arithmetic
};

constexpr int64_t kMinElementsToShare = 1 << 15;

template <class Format>
Rows IntegersOf(ffi::ThreadPool pool, const float* x, int64_t m, int64_t k) {
  using Row = RowOf<Format>;
  const int64_t groups = DepthOf(k) / Format::kGroup;
  const std::shared_ptr<Row[]> rows(new Row[static_cast<size_t>(groups * m)]);
  const auto convert = [=](int64_t first, int64_t last) {
    const FloatMode mode;
    for (int64_t r = first; r < last; ++r) FillIntegers<Format>(x, m, k, r, rows.get());
  };
  const int64_t threads = m * k < kMinElementsToShare ? 1 : std::min<int64_t>(pool.num_threads(), m);
  if (!Share(pool, threads, m, convert)) throw std::bad_alloc();
  return {rows, m, static_cast<int64_t>(sizeof(Row))};
}

// The panel of a format, and how its x is made.
std::optional<Layout> LayoutOf(std::string_view name) {
  std::optional<Layout> layout;
  WithFormat(name, [&](auto format) {
    using Format = decltype(format);
    layout = {Format::kBlock, Format::kWords, Format::kScaleBytes, nullptr, nullptr};
    if constexpr (!kIsFloat<Format>) {
      using Sums = SumsOf<KindOf<Format>>;
      layout->panel = RunIntegers<Format, typename Sums::Portable>;
      if constexpr (!std::is_same_v<typename Sums::Portable, typename Sums::Fastest>) {
        if (HasByteDots()) layout->panel = RunIntegers<Format, typename Sums::Fastest>;
      }
      layout->integers = IntegersOf<Format>;
    } else {
      layout->panel = RunPanel<Format, false>;
    }
  });
  return layout;
}

bool Fits(const Weight& weight, const Layout& layout, int64_t n, int64_t k) {
  const auto size = weight.words.dimensions();
  if (size.size() != 4 || size[2] != layout.words || size[3] != kColumns) return false;
  const auto scales = static_cast<int64_t>(weight.scales.size_bytes());
  return size[0] == (n + kColumns - 1) / kColumns && size[1] == (k + layout.block - 1) / layout.block &&
         scales == size[0] * size[1] * kColumns * layout.scale_bytes;
}

// Whether bfloat16 products of m rows use vdpbf16ps. Intel runs four multiply-adds of float32 in the time of one (a Xeon
// of family 6, model 207: 165 against 80 GFLOP/s per core); AMD since Zen 4 runs both at the same rate. One row is bound
// by memory.
bool UsesDots(Path path, int64_t m) {
#if defined(__AVX512F__)
  if (path == Path::kFloats || !HasDots()) return false;
  return path == Path::kDots || m == 1 || !__builtin_cpu_is("intel");
#else
  (void)path, (void)m;
  return false;
#endif
}

// Rows of x as float32 with zeros up to a multiple of kStep.
template <typename Element>
Rows Widened(const Element* x, int64_t m, int64_t k) {
  const int64_t stride = (k + kStep - 1) / kStep * kStep;
  const std::shared_ptr<float[]> rows(new float[static_cast<size_t>(m * stride)]);
  for (int64_t r = 0; r < m; ++r) {
    float* to = rows.get() + r * stride;
    for (int64_t i = 0; i < stride; i += kLanes) Store(to + i, LoadSome(x + r * k + i, k - i));
  }
  return {rows, stride, stride * 4};
}

}  // namespace

std::optional<Product> MakeProduct(ffi::ThreadPool pool, ffi::AnyBuffer x, const Weight& weight, int64_t m, int64_t n,
                                   Path path) {
  const std::optional<Layout> layout = LayoutOf(weight.format);
  const auto size = x.dimensions();
  if (!layout || size.size() != 2 || !Fits(weight, *layout, n, size[1])) return std::nullopt;
  const int64_t k = size[1], blocks = weight.words.dimensions()[1];
  const bool is_bfloat16 = x.element_type() == ffi::BF16;
  if (is_bfloat16 ? weight.format != "BF16" : x.element_type() != ffi::F32) return std::nullopt;
  Product product = {{x.untyped_data(), weight.words.typed_data(), weight.scales.untyped_data(), nullptr, m, n, k, k,
                      k * (is_bfloat16 ? 2 : 4), blocks * layout->words * kColumns, blocks * kColumns,
                      layout->scale_bytes},
                     layout->panel,
                     nullptr};
  Rows rows = {};
  if (is_bfloat16) {
    if (UsesDots(path, m)) {
#if defined(__AVX512F__)
      product.panel = RunDots;
#endif
      return product;
    }
    product.panel = RunPanel<BFloat16, true>;
    rows = Widened(static_cast<const uint16_t*>(x.untyped_data()), m, k);
  } else if (layout->integers != nullptr) {
    rows = layout->integers(pool, static_cast<const float*>(x.untyped_data()), m, k);
  } else if (k % kStep != 0) {
    rows = Widened(static_cast<const float*>(x.untyped_data()), m, k);
  } else {
    return product;
  }
  product.x = rows.data;
  product.problem.x = rows.data.get();
  product.problem.x_stride = rows.stride;
  product.problem.row_bytes = rows.bytes;
  return product;
}

}  // namespace LOGPROBD_NAMESPACE
