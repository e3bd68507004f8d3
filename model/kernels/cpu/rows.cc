// RMSNorm, gated activations, soft caps, and rotary embedding with the write to the cache, as handlers of XLA's foreign
// function interface. The arithmetic is in rows.h.

#include "rows.h"

#include <cstring>

#include "layout.h"
#include "handlers.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace {

using namespace logprobd;
using namespace LOGPROBD_NAMESPACE;

constexpr int64_t kMinElementsToShare = 1 << 15;  // fewer take less time than waking a thread

// Calls row(i) for each live row and fills the other rows of y, of `bytes` each, with zeros; returns Share's result.
template <typename Row>
bool ForRows(ffi::ThreadPool pool, int64_t rows, int64_t live, int64_t elements, void* y, int64_t bytes, Row row) {
  live = std::clamp<int64_t>(live, 0, rows);
  std::memset(static_cast<char*>(y) + live * bytes, 0, static_cast<size_t>((rows - live) * bytes));
  if (live == 0) return true;
  const int64_t threads = live * elements < kMinElementsToShare ? 1 : std::min<int64_t>(pool.num_threads(), live);
  return Share(pool, std::max<int64_t>(1, threads), live, [row](int64_t first, int64_t last) {
    const FloatMode mode;
    for (int64_t i = first; i < last; ++i) row(i);
  });
}

// Calls run with y as a pointer to its element type, float or bfloat16.
template <typename Run>
ffi::Error Typed(AnyResult& y, Run run) {
  if (y->element_type() == ffi::F32) return Outcome(run(static_cast<float*>(y->untyped_data())));
  if (y->element_type() == ffi::BF16) return Outcome(run(static_cast<uint16_t*>(y->untyped_data())));
  return ffi::Error::InvalidArgument("the result is bfloat16 or float32");
}

ffi::Error Norm(ffi::ThreadPool pool, F32 x, F32 weight, Live live, AnyResult y, float epsilon) {
  const auto xs = x.dimensions();
  if (xs.size() != 2 || weight.element_count() != static_cast<size_t>(xs[1]) ||
      y->element_count() != x.element_count()) {
    return ffi::Error::InvalidArgument("norm takes x [M, D] and weight [D] and gives y [M, D]");
  }
  const float *from = x.typed_data(), *weights = weight.typed_data();
  const int64_t size = xs[1];
  return Typed(y, [&](auto* to) {
    return ForRows(pool, xs[0], *live.typed_data(), size, to, size * sizeof(*to),
                   [=](int64_t i) { NormRow(from + i * size, weights, epsilon, size, to + i * size); });
  });
}

// row(gate, up, F, y) for each row of [M, 2 F].
template <typename Row>
ffi::Error Gated(ffi::ThreadPool pool, F32 x, Live live, AnyResult y, Row row) {
  const auto xs = x.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ys.size() != 2 || ys[0] != xs[0] || 2 * ys[1] != xs[1]) {
    return ffi::Error::InvalidArgument("a gated activation takes [M, 2 F], gate then up, and gives [M, F]");
  }
  const float* from = x.typed_data();
  const int64_t size = ys[1];
  return Typed(y, [&](auto* to) {
    return ForRows(pool, xs[0], *live.typed_data(), 2 * size, to, size * sizeof(*to),
                   [=](int64_t i) { row(from + 2 * i * size, from + (2 * i + 1) * size, size, to + i * size); });
  });
}

ffi::Error Swiglu(ffi::ThreadPool pool, F32 x, Live live, AnyResult y) {
  return Gated(pool, x, live, y, [](auto... row) { SwigluRow(row...); });
}

ffi::Error Geglu(ffi::ThreadPool pool, F32 x, Live live, AnyResult y) {
  return Gated(pool, x, live, y, [](auto... row) { GegluRow(row...); });
}

ffi::Error ClampedSwiglu(ffi::ThreadPool pool, F32 x, Live live, AnyResult y) {
  return Gated(pool, x, live, y, [](auto... row) { ClampedSwigluRow(row...); });
}

ffi::Error CapRows(ffi::ThreadPool pool, F32 x, Live live, ffi::Result<F32> y, float cap) {
  const auto xs = x.dimensions();
  if (xs.size() != 2 || y->element_count() != x.element_count() || !(cap > 0)) {
    return ffi::Error::InvalidArgument("soft_cap takes x [M, N] and a positive cap and gives y [M, N]");
  }
  const float* from = x.typed_data();
  float* to = y->typed_data();
  const int64_t size = xs[1];
  return Outcome(ForRows(pool, xs[0], *live.typed_data(), size, to, size * sizeof(*to),
                         [=](int64_t i) { SoftCapRow(from + i * size, cap, size, to + i * size); }));
}

// Weights and ids [M, k] of the experts of each token, from logits [M, X]; the M k rows, row m k + j being expert j of
// token m, sorted by expert, those of padding last; the place of each row, and where the rows of each expert start.
ffi::Error Route(ffi::ThreadPool pool, F32 logits, F32 bias, Live live, ffi::Result<F32> weights, ffi::Result<S32> ids,
                 ffi::Result<S32> order, ffi::Result<S32> places, ffi::Result<S32> starts, bool normalized,
                 bool sigmoid, int64_t groups, int64_t open, float scale) {
  const auto in = logits.dimensions(), out = weights->dimensions();
  const bool fits = in.size() == 2 && out.size() == 2 && out[0] == in[0] && out[1] >= 1 && out[1] <= in[1];
  const size_t rows = weights->element_count();
  if (!fits || ids->element_count() != rows || order->element_count() != rows || places->element_count() != rows ||
      starts->element_count() != static_cast<size_t>(in[1]) + 1 || groups < 1 || in[1] % groups != 0 || open < 1 ||
      (sigmoid && (bias.element_count() != static_cast<size_t>(in[1]) || (groups > 1 && in[1] / groups < 2)))) {
    return ffi::Error::InvalidArgument(
        "route takes logits [M, X] and bias [X] and gives weights [M, k], ids [M, k], order [M k], places [M k], "
        "starts [X + 1]");
  }
  const Router router = {in[1], out[1], groups, open, sigmoid, normalized, scale, bias.typed_data()};
  const int64_t count = in[1], k = out[1], tokens = std::clamp<int64_t>(*live.typed_data(), 0, in[0]);
  const float* from = logits.typed_data();
  float* shares = weights->typed_data();
  int32_t *chosen = ids->typed_data(), *sorted = order->typed_data(), *first = starts->typed_data();
  std::fill_n(chosen + tokens * k, (in[0] - tokens) * k, 0);
  const bool done = ForRows(pool, in[0], tokens, count, shares, k * sizeof(float), [=](int64_t i) {
    ChooseExperts(from + i * count, router, shares + i * k, chosen + i * k);
  });
  if (!done) return Outcome(false);
  std::fill_n(first, count + 1, 0);
  for (int64_t r = 0; r < tokens * k; ++r) ++first[chosen[r] + 1];
  for (int64_t e = 0; e < count; ++e) first[e + 1] += first[e];
  for (int64_t r = 0; r < in[0] * k; ++r) {
    const int64_t place = r < tokens * k ? first[chosen[r]]++ : r;
    places->typed_data()[r] = static_cast<int32_t>(place);
    sorted[place] = static_cast<int32_t>(r);
  }
  std::copy_backward(first, first + count, first + count + 1);  // each is now where the next one starts
  first[0] = 0;
  return ffi::Error::Success();
}

ffi::Error Combine(ffi::ThreadPool pool, F32 x, S32 places, F32 weights, Live live, ffi::Result<F32> y) {
  const auto in = x.dimensions(), by = weights.dimensions(), out = y->dimensions();
  const int64_t rows = in.size() == 2 ? in[0] : -1;
  if (by.size() != 2 || out.size() != 2 || out[0] != by[0] || rows != by[0] * by[1] || out[1] != in[1] ||
      places.element_count() != static_cast<size_t>(rows)) {
    return ffi::Error::InvalidArgument("combine takes x [M k, N], places [M k], weights [M, k] and gives y [M, N]");
  }
  const int32_t* at = places.typed_data();
  if (std::any_of(at, at + rows, [rows](int32_t place) { return place < 0 || place >= rows; })) {
    return ffi::Error::InvalidArgument("combine: a place is out of bounds");
  }
  const float *from = x.typed_data(), *of = weights.typed_data();
  float* to = y->typed_data();
  const int64_t k = by[1], size = in[1];
  return Outcome(ForRows(pool, by[0], *live.typed_data(), k * size, to, size * sizeof(float), [=](int64_t i) {
    CombineRow(from, at + i * k, of + i * k, k, size, to + i * size);
  }));
}

struct Heads {
  const float *heads, *cos, *sin;  // [R, T, H + 2 K, E], [R, T, half] twice; 2 half dimensions of a head are rotated
  const int32_t *tables, *positions;
  float* queries;  // [R, T, H, E]
  int64_t tokens, query_heads, kv_heads, size, half, table;
};

// Rotates the queries and keys of one token and stores its keys and values in their page. Padding is not stored.
template <typename Element>
void StoreToken(const Heads& h, int64_t token, Element* keys, Element* values) {
  const int64_t position = h.positions[token], size = h.size, half = h.half, rest = size - 2 * half;
  float* queries = h.queries + token * h.query_heads * size;
  if (position < 0) {
    std::fill_n(queries, h.query_heads * size, 0.0f);
    return;
  }
  const float* from = h.heads + token * (h.query_heads + 2 * h.kv_heads) * size;
  const float *cos = h.cos + token * half, *sin = h.sin + token * half;
  for (int64_t head = 0; head < h.query_heads; ++head, from += size) {
    RotateHead(from, cos, sin, half, queries + head * size);
    CopyHead(from + 2 * half, rest, queries + head * size + 2 * half);
  }
  const int64_t page = h.tables[token / h.tokens * h.table + position / kPage];
  for (int64_t head = 0; head < h.kv_heads; ++head, from += size) {
    const int64_t offset = ((page * h.kv_heads + head) * kPage + position % kPage) * size;
    RotateHead(from, cos, sin, half, keys + offset);
    CopyHead(from + 2 * half, rest, keys + offset + 2 * half);
    CopyHead(from + h.kv_heads * size, size, values + offset);
  }
}

// True if all pages that the call writes are in the cache.
bool InBounds(const Heads& h, int64_t all, int64_t pages) {
  for (int64_t token = 0; token < all; ++token) {
    const int64_t position = h.positions[token];
    if (position >= h.table * kPage) return false;
    if (position < 0) continue;
    const int64_t page = h.tables[token / h.tokens * h.table + position / kPage];
    if (page < 0 || page >= pages) return false;
  }
  return true;
}

ffi::Error RotateAndStore(ffi::ThreadPool pool, F32 heads, F32 cos, F32 sin, ffi::AnyBuffer keys_in,
                          ffi::AnyBuffer values_in, S32 tables, S32 positions, ffi::Result<F32> queries, AnyResult keys,
                          AnyResult values) {
  const auto in = heads.dimensions(), q = queries->dimensions(), k = keys->dimensions(), t = tables.dimensions(),
             c = cos.dimensions();
  if (in.size() != 4 || q.size() != 4 || k.size() != 4 || t.size() != 2 || k[2] != kPage || k[3] != in[3] ||
      values->element_count() != keys->element_count() || values->element_type() != keys->element_type() ||
      in[2] != q[2] + 2 * k[1] || t[0] != in[0] ||
      positions.element_count() != static_cast<size_t>(in[0] * in[1]) || cos.element_count() != sin.element_count() ||
      c.size() != 4 || cos.element_count() != static_cast<size_t>(in[0] * in[1] * c[3]) || 2 * c[3] > in[3]) {
    return ffi::Error::InvalidArgument(
        "rotate takes heads [R, T, H + 2 K, E], cos and sin [R, T, 1, e] with 2 e <= E, pages [N, K, 64, E], tables [R, P], "
        "positions [R, T]");
  }
  if (keys->untyped_data() != keys_in.untyped_data() || values->untyped_data() != values_in.untyped_data()) {
    return ffi::Error::Internal("rotate updates its pages in place, but was given other buffers for the results");
  }
  const Heads h = {heads.typed_data(),
                   cos.typed_data(),
                   sin.typed_data(),
                   tables.typed_data(),
                   positions.typed_data(),
                   queries->typed_data(),
                   in[1],
                   q[2],
                   k[1],
                   in[3],
                   c[3],
                   t[1]};
  const int64_t all = in[0] * in[1];
  if (!InBounds(h, all, k[0])) return ffi::Error::InvalidArgument("rotate: a page or a position is out of bounds");
  void* value_pages = values->untyped_data();
  return Typed(keys, [&](auto* to) {
    auto* values_to = static_cast<decltype(to)>(value_pages);
    return ForRows(pool, all, all, in[2] * in[3], to, 0, [=](int64_t i) { StoreToken(h, i, to, values_to); });
  });
}

auto GatedBinding() { return Bind<F32, Live>().Ret<ffi::AnyBuffer>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_norm, Norm,
                              (Bind<F32, F32, Live>().Ret<ffi::AnyBuffer>().Attr<float>("epsilon")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_swiglu, Swiglu, GatedBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_geglu, Geglu, GatedBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_clamped_swiglu, ClampedSwiglu, GatedBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_soft_cap, CapRows, (Bind<F32, Live>().Ret<F32>().Attr<float>("cap")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    logprobd_route, Route,
    (Bind<F32, F32, Live>().Ret<F32>().Ret<S32>().Ret<S32>().Ret<S32>().Ret<S32>().Attr<bool>("normalized")
         .Attr<bool>("sigmoid").Attr<int64_t>("groups").Attr<int64_t>("open").Attr<float>("scale")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_combine, Combine, (Bind<F32, S32, F32, Live>().Ret<F32>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_rotate, RotateAndStore,
                              (Bind<F32, F32, F32, ffi::AnyBuffer, ffi::AnyBuffer, S32, S32>()
                                   .Ret<F32>()
                                   .Ret<ffi::AnyBuffer>()
                                   .Ret<ffi::AnyBuffer>()));
