// Runs the kernels' arithmetic on made-up input and prints one line for each case: its name and a hash of the result's
// bits. tests/support/kernel_lines.py compiles it for several CPUs, and with sanitizers, and compares the lines.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "attention.h"
#include "dots.h"
#include "head.h"
#include "integers.h"
#include "rows.h"
#include "tiles.h"

namespace {

using namespace logprobd;
using namespace LOGPROBD_NAMESPACE;

class Random {  // PCG-XSH-RR, https://www.pcg-random.org
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 12345) {}
  uint32_t Next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    const auto mixed = static_cast<uint32_t>(((state_ >> 18) ^ state_) >> 27);
    const auto turn = static_cast<uint32_t>(state_ >> 59);
    return mixed >> turn | mixed << ((32 - turn) & 31);
  }
  float Between(float low, float high) { return low + (high - low) * (static_cast<float>(Next() >> 8) / 16777216.0f); }

 private:
  uint64_t state_;
};

// Bits of a float32: around 1, or sometimes subnormal or up to 2^60.
uint32_t Wide(Random& random) {
  const uint32_t kind = random.Next() % 16;
  const float x = random.Between(-2, 2) * (kind == 0 ? 0x1p59f : 1);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return kind == 1 ? bits & 0x807fffff : bits;
}

template <typename Element>
std::vector<Element> Filled(Random& random, int64_t count, float low, float high) {
  std::vector<Element> values(static_cast<size_t>(count));
  for (Element& value : values) {
    const float x = random.Between(low, high);
    if constexpr (sizeof(Element) == 4) {
      value = x;
    } else {
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      value = static_cast<uint16_t>(bits >> 16);
    }
  }
  return values;
}

template <typename Element>
void Print(const std::string& name, const std::vector<Element>& values) {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(Element); ++i) hash = (hash ^ bytes[i]) * 1099511628211u;
  std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash));
}

template <typename Element>
const char* NameOf() {
  return sizeof(Element) == 4 ? " float32" : " bfloat16";
}

// A weight [n, k] in a format, with finite values: some of its float16 factors are subnormal.
template <class Format>
class PackedWeight {
 public:
  PackedWeight(Random& random, int64_t n, int64_t k)
      : depth_((k + Format::kBlock - 1) / Format::kBlock),
        words_(static_cast<size_t>((n + kColumns - 1) / kColumns * depth_ * Format::kWords * kColumns)),
        scales_(words_.size() / Format::kWords) {
    for (size_t i = 0; i < words_.size(); ++i) {
      words_[i] = std::is_same_v<Format, Float32> ? Wide(random) : random.Next();
      if (std::is_same_v<Format, BFloat16>) {
        words_[i] = Wide(random) >> 16;
        words_[i] |= Wide(random) & 0xffff0000;
      }
      const auto word = static_cast<int64_t>(i) / kColumns % Format::kWords;
      if (!kIsFloat<Format> && i % kColumns < 2) words_[i] = i % kColumns == 0 ? 0 : ~0u;  // the extremes of all codes
      if (std::is_same_v<Format, Float16> || word == FactorWord()) words_[i] &= 0x9fff9fff;  // less than 2^-7
    }
    for (auto& scale : scales_) {
      const uint32_t bits = random.Next();
      scale = static_cast<typename Format::Scales>(Format::kScaleBytes == 1 ? bits % 8 ? 100 + bits % 50 : bits / 8 % 3
                                                                            : bits & 0x9fff);
    }
  }

  Problem With(const void* x, int64_t m, int64_t n, int64_t k, int64_t stride) const {
    const int64_t words = depth_ * Format::kWords * kColumns, scales = depth_ * kColumns;
    return {x, words_.data(), scales_.data(), nullptr, m, n, k, stride, 4 * stride, words, scales, Format::kScaleBytes};
  }

 private:
  // The word of a block that holds float16 factors.
  static constexpr int64_t FactorWord() {
    if (std::is_same_v<Format, Q2K>) return 20;
    if (std::is_same_v<Format, Fp8>) return 0;  // a float32 scale, also of Int4 and Int8
    return kIsFloat<Format> || Format::kScaleBytes > 0 ? -1 : 0;
  }

  int64_t depth_;
  std::vector<uint32_t> words_;
  std::vector<typename Format::Scales> scales_;
};

std::vector<float> Run(Problem p, Panel panel) {
  std::vector<float> y(static_cast<size_t>(p.m * p.n));
  p.y = y.data();
  panel(p, 0, (p.n + kColumns - 1) / kColumns);
  return y;
}

// One block of columns at a time, as another thread may compute it, each with a result of its own.
std::vector<float> RunEachBlock(const Problem& p, Panel panel) {
  std::vector<float> y(static_cast<size_t>(p.m * p.n));
  for (int64_t first = 0; first < p.n; first += kColumns) {
    const int64_t count = std::min(kColumns, p.n - first);
    const std::vector<float> part = Run(Columns(p, first, count, nullptr), panel);
    for (int64_t r = 0; r < p.m; ++r) std::copy_n(part.data() + r * count, count, y.data() + r * p.n + first);
  }
  return y;
}

void CheckSame(const std::string& name, const float* a, const std::vector<float>& b) {
  if (std::memcmp(a, b.data(), b.size() * sizeof(float)) == 0) return;
  std::fprintf(stderr, "%s: the same row has other bits\n", name.c_str());
  std::exit(1);
}

constexpr int64_t kMaxRows = 25;

// Prints products of 1 to kMaxRows rows; each row must have the same bits in all of them.
void Products(const std::string& name, const Problem& full, Panel panel) {
  const std::vector<float> y = Run(full, panel);
  for (const int64_t m : {1, 2, 3, 4, 5, 13, 25}) {
    Problem p = full;
    p.m = m;
    p.x = static_cast<const char*>(full.x) + (full.m - m) * full.row_bytes;  // the last rows
    const std::vector<float> some = Run(p, panel);
    const std::string here =
        "linear " + name + " " + std::to_string(m) + " " + std::to_string(p.n) + " " + std::to_string(p.k);
    CheckSame(here, &y[static_cast<size_t>((full.m - m) * p.n)], some);
    CheckSame(here + " by blocks", some.data(), RunEachBlock(p, panel));
    Print(here, some);
  }
}

// Rows [kMaxRows, k] `stride` apart, with zeros between; some elements are subnormal, and some very large.
std::vector<uint32_t> WideRows(Random& random, int64_t k, int64_t stride) {
  std::vector<uint32_t> x(static_cast<size_t>(kMaxRows * stride));
  for (int64_t i = 0; i < kMaxRows * k; ++i) x[static_cast<size_t>(i / k * stride + i % k)] = Wide(random);
  return x;
}

constexpr int64_t kSizes[][2] = {{100, 300}, {31, 257}, {64, 33}, {1, 1}};  // n, k

template <class Format>
void Linear(const std::string& name) {
  for (const auto& [n, k] : kSizes) {
    Random random(static_cast<uint64_t>(n * 1000 + k));
    const int64_t stride = (k + kStep - 1) / kStep * kStep;
    const PackedWeight<Format> weight(random, n, k);
    const std::vector<uint32_t> x = WideRows(random, k, stride);
    Problem p = weight.With(x.data(), kMaxRows, n, k, stride);
    if constexpr (!kIsFloat<Format>) {
      using Row = RowOf<Format>;
      const int64_t groups = DepthOf(k) / Format::kGroup;
      std::vector<float> floats(static_cast<size_t>(kMaxRows * k));
      for (int64_t r = 0; r < kMaxRows; ++r) {
        std::memcpy(&floats[static_cast<size_t>(r * k)], &x[static_cast<size_t>(r * stride)],
                    static_cast<size_t>(k) * sizeof(float));
      }
      for (int64_t i = 0; i < k; ++i) {  // digits of -128 and of 127, and an integer that is halved
        floats[static_cast<size_t>(i)] = i % 32 == 0 ? 1.0f : 127.0f / 128;
        floats[static_cast<size_t>(k + i)] = -floats[static_cast<size_t>(i)];
        floats[static_cast<size_t>(2 * k + i)] = 0x1.fffffep0f;
      }
      std::vector<Row> rows(static_cast<size_t>(groups * kMaxRows));
      for (int64_t r = 0; r < kMaxRows; ++r) FillIntegers<Format>(floats.data(), kMaxRows, k, r, rows.data());
      p.x = rows.data(), p.x_stride = kMaxRows, p.row_bytes = sizeof(Row);
      Products(name, p, RunIntegers<Format>);
#if defined(__aarch64__)
      if (HasByteDots()) {
        using Sums = typename SumsOf<KindOf<Format>>::Fastest;
        CheckSame(name + " dots", Run(p, RunIntegers<Format>).data(), Run(p, RunIntegers<Format, Sums>));
      }
#endif
    } else {
      Products(name, p, RunPanel<Format, false>);
    }
  }
}

// bfloat16 x: by multiply-adds of float32, and by vdpbf16ps if this CPU has it.
void LinearOfBfloat16(int64_t n, int64_t k) {
  Random random(static_cast<uint64_t>(n * 1000 + k));
  const int64_t stride = (k + kStep - 1) / kStep * kStep;
  const PackedWeight<BFloat16> weight(random, n, k);
  std::vector<uint32_t> x = WideRows(random, k, stride);
  for (uint32_t& bits : x) bits &= 0xffff0000;
  const Problem floats = weight.With(x.data(), kMaxRows, n, k, stride);
  Products("bfloat16", floats, RunPanel<BFloat16, true>);
#if defined(__AVX512F__)
  if (!HasDots()) return;
  std::vector<uint16_t> rows(static_cast<size_t>(kMaxRows * k));
  for (int64_t i = 0; i < kMaxRows * k; ++i) {
    rows[static_cast<size_t>(i)] = static_cast<uint16_t>(x[static_cast<size_t>(i / k * stride + i % k)] >> 16);
  }
  const std::vector<float> y = Run(floats, RunPanel<BFloat16, true>);
  for (const int64_t m : {1, 2, 3, 4, 5, 13, 25}) {
    const Problem dots = weight.With(rows.data(), m, n, k, k);
    CheckSame("dots " + std::to_string(m), y.data(), Run(dots, RunDots));
    CheckSame("dots by blocks " + std::to_string(m), y.data(), RunEachBlock(dots, RunDots));
  }
#endif
}

template <typename Element>
void AttendAll(const Pages& p) {
  const Scratch scratch(std::min(kQueryTokens, p.rows * p.tokens) * (p.heads / p.kv_heads), p.size);
  for (const Block& block : BlocksOf(p)) {
    for (int64_t head = 0; head < p.kv_heads; ++head) Attend<Element>(p, {block, head}, scratch);
  }
}

template <typename Element>
void Attention(int64_t tokens, int64_t before, int64_t heads, int64_t kv_heads, int64_t size, int64_t window,
               float cap = 0, bool has_sinks = false) {
  Random random(static_cast<uint64_t>(tokens * 1000 + before * 100 + size));
  const int64_t rows = 2, table = (before + tokens + kPage - 1) / kPage, pages = rows * table + 1;
  const auto queries = Filled<float>(random, rows * tokens * heads * size, -3, 3);
  const auto keys = Filled<Element>(random, pages * kv_heads * kPage * size, -2, 2);
  const auto values = Filled<Element>(random, pages * kv_heads * kPage * size, -2, 2);
  const auto sinks = Filled<float>(random, heads, -3, 3);
  std::vector<int32_t> tables, positions;
  for (int64_t i = 0; i < rows * table; ++i) tables.push_back(static_cast<int32_t>(pages - 1 - i));
  for (int64_t i = 0; i < rows * tokens; ++i) {
    const bool padding = i / tokens == 1 && i % tokens > tokens / 2;
    positions.push_back(padding ? -1 : static_cast<int32_t>(before + i % tokens));
  }
  std::vector<float> out(queries.size());
  const Pages p = {tables.data(),
                   positions.data(),
                   queries.data(),
                   keys.data(),
                   values.data(),
                   out.data(),
                   rows,
                   tokens,
                   heads,
                   kv_heads,
                   size,
                   table,
                   pages,
                   window,
                   1 / __builtin_sqrtf(static_cast<float>(size)),
                   cap,
                   has_sinks ? sinks.data() : nullptr};
  AttendAll<Element>(p);
  // The same tokens packed, one in a row, with the table of its request.
  std::vector<int32_t> repeated;
  for (int64_t i = 0; i < rows * tokens; ++i) {
    repeated.insert(repeated.end(), tables.begin() + i / tokens * table, tables.begin() + (i / tokens + 1) * table);
  }
  std::vector<float> packed(out.size());
  Pages one = p;
  one.tables = repeated.data(), one.out = packed.data(), one.rows = rows * tokens, one.tokens = 1;
  AttendAll<Element>(one);
  if (std::memcmp(out.data(), packed.data(), out.size() * sizeof(float)) != 0) {
    std::puts("packed rows have other bits");
    std::exit(1);
  }
  Print("attention " + std::to_string(tokens) + " after " + std::to_string(before) + " of " + std::to_string(heads) +
            "x" + std::to_string(size) + " window " + std::to_string(window) + (cap > 0 ? " capped" : "") +
            (has_sinks ? " sinks" : "") + NameOf<Element>(),
        out);
}

template <typename Element>
void Rows(int64_t size) {
  Random random(static_cast<uint64_t>(size));
  const auto x = Filled<float>(random, 2 * size, -20, 20), w = Filled<float>(random, size, 0, 2);
  std::vector<Element> norm(static_cast<size_t>(size)), swiglu(norm), copy(norm), turned(static_cast<size_t>(2 * size));
  NormRow(x.data(), w.data(), 1e-5f, size, norm.data());
  SwigluRow(x.data(), x.data() + size, size, swiglu.data());
  std::vector<Element> geglu(static_cast<size_t>(size));
  GegluRow(x.data(), x.data() + size, size, geglu.data());
  std::vector<Element> clamped(static_cast<size_t>(size));
  ClampedSwigluRow(x.data(), x.data() + size, size, clamped.data());
  std::vector<float> capped(static_cast<size_t>(2 * size));
  SoftCapRow(x.data(), 7, 2 * size, capped.data());
  CopyHead(x.data(), size, copy.data());
  RotateHead(x.data(), w.data(), w.data(), size, turned.data());
  const std::string name = std::to_string(size) + NameOf<Element>();
  Print("norm " + name, norm);
  Print("swiglu " + name, swiglu);
  Print("geglu " + name, geglu);
  Print("clamped swiglu " + name, clamped);
  Print("soft cap " + name, capped);
  Print("copy " + name, copy);
  Print("rotate " + name, turned);
}

void Head(const std::string& kind, int64_t vocab, int64_t k) {
  Random random(static_cast<uint64_t>(vocab + k));
  auto logits = Filled<float>(random, 2 * vocab, -30, 30);
  for (float& x : logits) {
    if (kind == "ties") x = std::round(x);
    if (kind == "mostly banned" && random.Next() % 8 != 0) x = -std::numeric_limits<float>::infinity();
  }
  if (kind == "all nan") std::fill(logits.begin(), logits.end(), std::numeric_limits<float>::quiet_NaN());
  if (kind == "nan") logits[static_cast<size_t>(vocab / 2)] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<int32_t> ids = {0, static_cast<int32_t>(vocab - 1)};
  const std::vector<int32_t> requested = {static_cast<int32_t>(vocab / 2), kNoId, kNoId, kNoId};
  std::vector<float> floats(static_cast<size_t>(2 * (1 + k + 2 + 1)));
  std::vector<int32_t> counts(static_cast<size_t>(2 * (1 + k + 2)));
  float* f = floats.data();
  int32_t* c = counts.data();
  const TokenLogprobs call = {
      2, vocab, k, 2, ids.data(), requested.data(), f, c, c + 2, f + 2, f + 2 + 2 * k, c + 2 + 2 * k, f + 6 + 2 * k};
  Accumulator accumulator(call);
  for (int64_t r = 0; r < 2; ++r) {
    Row& row = accumulator.rows[static_cast<size_t>(r)];
    for (Token& token : row.tokens) token.logit = logits[static_cast<size_t>(r * vocab + token.id)];
    TopK top(k);
    for (int64_t panel = 0; panel < accumulator.panels; ++panel) {
      const std::vector<float> own(logits.begin() + r * vocab + panel * kPanel,
                                   logits.begin() + r * vocab + std::min(vocab, (panel + 1) * kPanel));
      AccumulatePanel(row, panel, own.data(), static_cast<int64_t>(own.size()), top);
    }
    row.candidates = top.candidates();
    WriteRow(accumulator, r);
  }
  for (float& x : floats) {
    if (x != x) x = std::numeric_limits<float>::quiet_NaN();  // a NaN's sign is the CPU's own
  }
  Print("head " + kind + " " + std::to_string(vocab), floats);
  Print("head counts " + kind + " " + std::to_string(vocab), counts);
}

}  // namespace

int main() {
  if (!RunsHere()) return 77;
  const FloatMode mode;
  Linear<Q4_1>("Q4_1");
  Linear<Q5_0>("Q5_0");
  Linear<Q3K>("Q3_K");
  Linear<Q4K>("Q4_K");
  Linear<Mxfp4>("MXFP4");
  Linear<Int4<64>>("INT4_64");
  Linear<Fp8>("FP8_128");
  Linear<BFloat16>("BF16");
  for (const auto& [n, k] : kSizes) LinearOfBfloat16(n, k);
  Attention<uint16_t>(1, 200, 9, 3, 64, 0);
  Attention<float>(1, 63, 14, 2, 64, 0);
  Attention<uint16_t>(70, 30, 4, 1, 98, 0);
  Attention<float>(40, 100, 3, 3, 6, 50);
  Attention<uint16_t>(33, 0, 8, 1, 128, 7);
  Attention<float>(40, 100, 4, 2, 16, 50, 2);
  Attention<uint16_t>(40, 100, 6, 2, 16, 50, 0, true);
  for (const int64_t size : {1, 15, 16, 17, 96, 577}) {
    Rows<float>(size);
    Rows<uint16_t>(size);
  }
  for (const char* kind : {"plain", "ties", "mostly banned", "nan", "all nan"}) {
    Head(kind, 40, 20);
    Head(kind, 1024, 5);
    Head(kind, 5003, 20);
  }
#if !defined(__SANITIZE_ADDRESS__)  // it compiles slowly: only one format of each layout; `make sanitize` runs all
  Linear<Q4_0>("Q4_0");
  Linear<Q5_1>("Q5_1");
  Linear<Q8_0>("Q8_0");
  Linear<Q2K>("Q2_K");
  Linear<Q5K>("Q5_K");
  Linear<Q6K>("Q6_K");
  Linear<Iq4Nl>("IQ4_NL");
  Linear<Iq4Xs>("IQ4_XS");
  Linear<Int8<32>>("INT8_32");
  Linear<Float16>("F16");
  Linear<Float32>("F32");
#endif
  return 0;
}
