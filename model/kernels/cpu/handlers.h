// Shared by the handlers: types and binding of their arguments, and the error that they return.

#pragma once

#include <cstdint>
#include <new>
#include <utility>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace LOGPROBD_NAMESPACE {

namespace ffi = xla::ffi;

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U32 = ffi::Buffer<ffi::U32>;
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

// The outcome of call(), or that memory ran out: exceptions must not reach XLA.
template <typename Call>
ffi::Error Guarded(Call call) {
  try {
    return call();
  } catch (const std::bad_alloc&) {
    return Outcome(false);
  }
}

}  // namespace LOGPROBD_NAMESPACE
