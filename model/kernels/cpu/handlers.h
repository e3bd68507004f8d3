// Shared by the handlers: types and binding of their arguments, the error that they return, and the packed weight that
// they receive, in a layout of tiles.h.

#pragma once

#include <cstdint>
#include <utility>

#include "tiles.h"
#include "xla/ffi/api/ffi.h"

namespace LOGPROBD_NAMESPACE {

namespace ffi = xla::ffi;

using F32 = ffi::Buffer<ffi::F32>;
using Bf16 = ffi::Buffer<ffi::BF16>;
using F16 = ffi::Buffer<ffi::F16>;
using S8 = ffi::Buffer<ffi::S8>;
using S32 = ffi::Buffer<ffi::S32>;
using Live = ffi::BufferR0<ffi::S32>;  // number of rows that are not padding
using AnyResult = ffi::Result<ffi::AnyBuffer>;

// The binding with arguments of the types First, Rest.
template <typename First, typename... Rest, typename Binding>
auto BindArguments(Binding&& binding) {
  if constexpr (sizeof...(Rest) == 0) {
    return std::move(binding).template Arg<First>();
  } else {
    return BindArguments<Rest...>(std::move(binding).template Arg<First>());
  }
}

// The binding of a handler that takes the thread pool and arguments of these types.
template <typename... Types>
auto Bind() {
  return BindArguments<Types...>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>());
}

inline ffi::Error Outcome(bool succeeded) {
  return succeeded ? ffi::Error::Success()
                   : ffi::Error(ffi::ErrorCode::kResourceExhausted, "a kernel ran out of memory");
}

// A packed weight [N, K]: bfloat16 in pairs, or int8 with scales.
struct Weight {
  const void* data;
  const void* scales;             // null for bfloat16
  int64_t blocks, depth, groups;  // depth: pairs of K, or elements of K; 0 blocks if the shapes do not match
  int64_t stride;

  bool Fits(int64_t n, int64_t k) const {
    const bool deep = scales == nullptr ? (k + 1) / 2 == depth : groups == (k + kGroup - 1) / kGroup;
    return blocks > 0 && (n + kColumns - 1) / kColumns == blocks && deep;
  }

  Problem MakeProblem(const void* x, void* y, bool bf16, int64_t m, int64_t n, int64_t k) const {
    return {static_cast<const uint16_t*>(x),
            static_cast<const uint16_t*>(data),
            static_cast<const uint16_t*>(scales),
            y,
            bf16,
            m,
            n,
            k,
            blocks,
            stride};
  }
};

// [ceil(N/32), ceil(K/2), 32, 2]
inline Weight PairsOf(Bf16 w) {
  const auto size = w.dimensions();
  if (size.size() != 4 || size[2] != kColumns || size[3] != 2) return {};
  return {w.typed_data(), nullptr, size[0], size[1], 0, size[1] * kPair};
}

// [ceil(N/32), ceil(K/32) * 32, 32] and [ceil(N/32), ceil(K/32), 32]
inline Weight Int8Of(S8 w, F16 scales) {
  const auto size = w.dimensions(), groups = scales.dimensions();
  if (size.size() != 3 || groups.size() != 3 || size[2] != kColumns || groups[2] != kColumns || groups[0] != size[0] ||
      size[1] != groups[1] * kGroup) {
    return {};
  }
  return {w.typed_data(), scales.typed_data(), size[0], size[1], groups[1], size[1] * kColumns / 2};
}

}  // namespace LOGPROBD_NAMESPACE
