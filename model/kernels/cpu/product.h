// A product as the handlers receive it: x, a packed weight, and the panel that computes it.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

#include "handlers.h"
#include "tiles.h"

namespace LOGPROBD_NAMESPACE {

// How bfloat16 products are computed, with equal results.
enum class Path { kFastest, kDots, kFloats };

// A packed weight [N, K] in a format of formats.h.
struct Weight {
  U32 words;                // [ceil(N/32), ceil(K/B), W, 32]
  ffi::AnyBuffer scales;    // [ceil(N/32), ceil(K/B), 32], or empty
  std::string_view format;  // its name
};

struct Product {
  Problem problem;
  Panel panel;
  std::shared_ptr<const void> x;  // of the problem, if the caller's had to be converted or padded
};

// The product of the first m rows of x [M, K], float32 or bfloat16, and a weight with n rows. y stays to be set.
// No value: the shapes or dtypes do not match.
std::optional<Product> MakeProduct(ffi::ThreadPool pool, ffi::AnyBuffer x, const Weight& weight, int64_t m, int64_t n,
                                   Path path = Path::kFastest);

}  // namespace LOGPROBD_NAMESPACE
