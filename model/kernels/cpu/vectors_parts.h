// Partial loads and stores for CPUs without masks: through a buffer of 16 elements.

#pragma once

namespace LOGPROBD_NAMESPACE {

// The first `count` lanes; the others are zeros, and are not read.
template <typename Element>
LOGPROBD_INLINE Floats LoadSome(const Element* from, int64_t count) {
  if (count >= 16) return Load(from);
  Element all[16] = {};
  std::copy_n(from, std::max<int64_t>(count, 0), all);
  return Load(all);
}

template <typename Element>
LOGPROBD_INLINE void StoreSome(Element* to, int64_t count, Floats value) {
  if (count >= 16) return StoreAll(to, value);
  Element all[16];
  StoreAll(all, value);
  std::copy_n(all, std::max<int64_t>(count, 0), to);
}

LOGPROBD_INLINE float AsFloat(uint16_t bits) { return ToFloat(bits); }
LOGPROBD_INLINE float AsFloat(float value) { return value; }

// Elements e and e + 1 of `count` rows, `stride` elements apart, from `from` = element e of the first; zeros after
// them.
template <typename Element>
LOGPROBD_INLINE Pairs GatherPairs(const Element* from, int64_t stride, int64_t count) {
  float first[16] = {}, second[16] = {};
  for (int64_t i = 0; i < std::min<int64_t>(count, 16); ++i) {
    first[i] = AsFloat(from[i * stride]);
    second[i] = AsFloat(from[i * stride + 1]);
  }
  return {Load(first), Load(second)};
}

}  // namespace LOGPROBD_NAMESPACE
