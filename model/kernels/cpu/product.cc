// The panels of all formats, and the choice among them.

#include "product.h"

#include <algorithm>

#include "dots.h"

namespace LOGPROBD_NAMESPACE {

namespace {

struct Layout {
  int64_t block, words, scale_bytes;
  Panel panel;
};

std::optional<Layout> LayoutOf(std::string_view name) {
  std::optional<Layout> layout;
  WithFormat(name, [&](auto format) {
    using Format = decltype(format);
    layout = {Format::kBlock, Format::kWords, Format::kScaleBytes, RunPanel<Format, false>};
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
std::shared_ptr<const float[]> Widened(const Element* x, int64_t m, int64_t k, int64_t stride) {
  const std::shared_ptr<float[]> rows(new float[static_cast<size_t>(m * stride)]);
  for (int64_t r = 0; r < m; ++r) {
    float* to = rows.get() + r * stride;
    for (int64_t i = 0; i < stride; i += kLanes) Store(to + i, LoadSome(x + r * k + i, k - i));
  }
  return rows;
}

}  // namespace

std::optional<Product> MakeProduct(ffi::AnyBuffer x, const Weight& weight, int64_t m, int64_t n, Path path) {
  const std::optional<Layout> layout = LayoutOf(weight.format);
  const auto size = x.dimensions();
  if (!layout || size.size() != 2 || !Fits(weight, *layout, n, size[1])) return std::nullopt;
  const int64_t k = size[1], stride = (k + kStep - 1) / kStep * kStep;
  const auto blocks = weight.words.dimensions();
  Product product = {{x.untyped_data(), weight.words.typed_data(), weight.scales.untyped_data(), nullptr, m, n, k, k,
                      blocks[1] * layout->words * kColumns, blocks[1] * kColumns, layout->scale_bytes},
                     layout->panel,
                     x.element_type() == ffi::BF16 ? 2 : 4,
                     nullptr};
  if (x.element_type() == ffi::BF16) {
    if (weight.format != "BF16") return std::nullopt;
#if defined(__AVX512F__)
    if (UsesDots(path, m)) {
      product.panel = RunDots;
      return product;
    }
#endif
    product.panel = RunPanel<BFloat16, true>;
    product.x = Widened(static_cast<const uint16_t*>(x.untyped_data()), m, k, stride);
  } else if (x.element_type() == ffi::F32) {
    if (k != stride) product.x = Widened(static_cast<const float*>(x.untyped_data()), m, k, stride);
  } else {
    return std::nullopt;
  }
  if (product.x != nullptr) {
    product.problem.x = product.x.get();
    product.problem.x_stride = stride;
    product.x_bytes = 4;
  }
  return product;
}

}  // namespace LOGPROBD_NAMESPACE
