// Runs the kernels' arithmetic on made-up input and prints one line for each case: its name and a hash of the result's
// bits. tests/support/kernel_lines.py compiles it for several CPUs, and with sanitizers, and compares the lines.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "attention.h"
#include "head.h"
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

template <typename Element>
std::vector<Element> Product(Problem p, TileTable tiles) {
  std::vector<Element> y(static_cast<size_t>(p.m * p.n));
  p.y = y.data();
  p.bf16 = sizeof(Element) == 2;
  for (int64_t block = 0; block < p.blocks; ++block) Compute(p, tiles, block, block + 1 < p.blocks);
  return y;
}

void Linear(int64_t m, int64_t n, int64_t k) {
  Random random(static_cast<uint64_t>(m * 10000 + n * 100 + k));
  const int64_t blocks = (n + kColumns - 1) / kColumns, pairs = (k + 1) / 2, groups = (k + kGroup - 1) / kGroup;
  const auto x = Filled<uint16_t>(random, m * k, -2, 2), w = Filled<uint16_t>(random, blocks * pairs * kPair, -1, 1);
  const std::string name = "linear " + std::to_string(m) + " " + std::to_string(n) + " " + std::to_string(k);
  const Problem bfloats = {x.data(), w.data(), nullptr, nullptr, false, m, n, k, blocks, pairs * kPair};
  Print(name, Product<float>(bfloats, FastestTiles()));
  Print(name + " floats", Product<float>(bfloats, FloatTiles()));
  Print(name + NameOf<uint16_t>(), Product<uint16_t>(bfloats, FastestTiles()));
  std::vector<uint16_t> bytes(static_cast<size_t>(blocks * groups * kGroup * kColumns / 2));
  for (uint16_t& two : bytes) two = static_cast<uint16_t>(random.Next());
  std::vector<uint16_t> scales(static_cast<size_t>(blocks * groups * kColumns));
  for (uint16_t& scale : scales) scale = static_cast<uint16_t>(0x1000 + random.Next() % 0x2000);  // 2^-11 to 2^-3
  const int64_t stride = groups * kGroup * kColumns / 2;
  const Problem int8s = {x.data(), bytes.data(), scales.data(), nullptr, false, m, n, k, blocks, stride};
  Print(name + " int8", Product<float>(int8s, Int8Tiles()));
  const int64_t first = (blocks - 1) * kColumns;
  std::vector<float> part(static_cast<size_t>(m * (n - first)));
  Problem last = Columns(int8s, first, n - first, part.data());
  Print(name + " int8 columns", Product<float>(last, Int8Tiles()));
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
               float cap = 0) {
  Random random(static_cast<uint64_t>(tokens * 1000 + before * 100 + size));
  const int64_t rows = 2, table = (before + tokens + kPage - 1) / kPage, pages = rows * table + 1;
  const auto queries = Filled<float>(random, rows * tokens * heads * size, -3, 3);
  const auto keys = Filled<Element>(random, pages * kv_heads * kPage * size, -2, 2);
  const auto values = Filled<Element>(random, pages * kv_heads * kPage * size, -2, 2);
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
                   cap};
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
            NameOf<Element>(),
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
  std::vector<float> capped(static_cast<size_t>(2 * size));
  SoftCapRow(x.data(), 7, 2 * size, capped.data());
  CopyHead(x.data(), size, copy.data());
  RotateHead(x.data(), w.data(), w.data(), size, turned.data());
  const std::string name = std::to_string(size) + NameOf<Element>();
  Print("norm " + name, norm);
  Print("swiglu " + name, swiglu);
  Print("geglu " + name, geglu);
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
  for (const int64_t m : {1, 2, 3, 4, 5, 6, 11, 12, 13, 25}) {
    Linear(m, 100, 300);
    Linear(m, 31, 257);
    Linear(m, 64, 33);
  }
  Linear(1, 1, 1);
  Attention<uint16_t>(1, 200, 9, 3, 64, 0);
  Attention<float>(1, 63, 14, 2, 64, 0);
  Attention<uint16_t>(70, 30, 4, 1, 98, 0);
  Attention<float>(40, 100, 3, 3, 6, 50);
  Attention<uint16_t>(33, 0, 8, 1, 128, 7);
  Attention<float>(40, 100, 4, 2, 16, 50, 2);
  for (const int64_t size : {1, 15, 16, 17, 96, 577}) {
    Rows<float>(size);
    Rows<uint16_t>(size);
  }
  for (const char* kind : {"plain", "ties", "mostly banned", "nan", "all nan"}) {
    Head(kind, 40, 20);
    Head(kind, 1024, 5);
    Head(kind, 5003, 20);
  }
  return 0;
}
