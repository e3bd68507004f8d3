// What a handler says to XLA of a call that was shared among threads.

#pragma once

#include "xla/ffi/api/ffi.h"

namespace logprobd {

inline xla::ffi::Error Outcome(bool all_done) {
  if (all_done) return xla::ffi::Error::Success();
  return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted, "a kernel ran out of memory");
}

}  // namespace logprobd
