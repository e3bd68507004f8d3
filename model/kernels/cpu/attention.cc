// Attention over pages as a handler of XLA's foreign function interface. The arithmetic is in attention.h.

#include "attention.h"

#include <memory>

#include "handlers.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace {

using namespace logprobd;
using namespace LOGPROBD_NAMESPACE;

constexpr int64_t kMinWorkToShare = 1 << 15;  // multiply-adds; fewer take less time than waking a thread

// Upper bound of a call's multiply-adds, from its longest row.
int64_t WorkOf(const Pages& p) {
  const int64_t tokens = p.rows * p.tokens;
  const int64_t longest = tokens > 0 ? *std::max_element(p.positions, p.positions + tokens) + 1 : 0;
  return tokens * p.heads * longest * p.size;
}

template <typename Element>
bool AttendAll(ffi::ThreadPool pool, const Pages& pages) {
  const auto blocks = std::make_shared<const std::vector<Block>>(BlocksOf(pages));
  const int64_t units = static_cast<int64_t>(blocks->size()) * pages.kv_heads;
  const int64_t most = WorkOf(pages) < kMinWorkToShare ? 1 : pool.num_threads();
  return Share(pool, std::max<int64_t>(1, std::min(most, units)), units, [pages, blocks](int64_t first, int64_t last) {
    const FloatMode mode;
    const int64_t widest = std::min(kQueryTokens, pages.rows * pages.tokens) * (pages.heads / pages.kv_heads);
    const Scratch scratch(widest, pages.size);
    for (int64_t i = first; i < last; ++i) {
      Attend<Element>(pages, {(*blocks)[static_cast<size_t>(i / pages.kv_heads)], i % pages.kv_heads}, scratch);
    }
  });
}

// True if all addresses that the call reads are valid: ids in the cache, positions in the tables.
bool InBounds(const Pages& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const int32_t* positions = p.positions + row * p.tokens;
    const int64_t last = p.tokens > 0 ? *std::max_element(positions, positions + p.tokens) : -1;
    if (last >= p.table * kPage) return false;
    for (int64_t i = 0; i * kPage <= last; ++i) {
      const int64_t id = p.tables[row * p.table + i];
      if (id < 0 || id >= p.pages) return false;
    }
  }
  return true;
}

ffi::Error Attention(ffi::ThreadPool pool, F32 queries, ffi::AnyBuffer keys, ffi::AnyBuffer values, S32 tables,
                     S32 positions, F32 sinks, ffi::Result<F32> out, int64_t window, float scale, float cap) {
  const auto q = queries.dimensions(), k = keys.dimensions(), v = values.dimensions(), t = tables.dimensions();
  const auto p = positions.dimensions();
  if (q.size() != 4 || k.size() != 4 || v.size() != 4 || t.size() != 2 || p.size() != 2 ||
      !std::equal(k.begin(), k.end(), v.begin()) || k[2] != kPage || k[3] != q[3] || q[3] % 2 != 0 || k[1] < 1 ||
      q[2] % k[1] != 0 || t[0] != q[0] || p[0] != q[0] || p[1] != q[1] ||
      out->element_count() != queries.element_count() || keys.element_type() != values.element_type() ||
      (sinks.element_count() != 0 && sinks.element_count() != static_cast<size_t>(q[2]))) {
    return ffi::Error::InvalidArgument(
        "attention takes q [R, T, H, E], keys and values [N, K, 64, E], tables [R, P], positions [R, T], sinks [H] "
        "or [0]");
  }
  const Pages pages = {tables.typed_data(),
                       positions.typed_data(),
                       queries.typed_data(),
                       keys.untyped_data(),
                       values.untyped_data(),
                       out->typed_data(),
                       q[0],
                       q[1],
                       q[2],
                       k[1],
                       q[3],
                       t[1],
                       k[0],
                       window,
                       scale,
                       cap,
                       sinks.element_count() != 0 ? sinks.typed_data() : nullptr};
  if (!InBounds(pages)) return ffi::Error::InvalidArgument("attention: a page or a position is out of bounds");
  if (keys.element_type() == ffi::BF16) return Outcome(AttendAll<uint16_t>(pool, pages));
  if (keys.element_type() == ffi::F32) return Outcome(AttendAll<float>(pool, pages));
  return ffi::Error::InvalidArgument("attention takes bfloat16 or float32 pages");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_attention, Attention,
                              (Bind<F32, ffi::AnyBuffer, ffi::AnyBuffer, S32, S32, F32>()
                                   .Ret<F32>()
                                   .Attr<int64_t>("window")
                                   .Attr<float>("scale")
                                   .Attr<float>("cap")));
