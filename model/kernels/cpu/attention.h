// The arithmetic of attention.cc: causal attention of a block of queries over the pages of one table and key/value
// head.
//
// Determinism: a query's result depends only on its own values and on its row's keys and values. Pages come in order, a
// page has the same 64 slots for every caller, and each sum runs in one fixed order: a score over the head's
// elements ascending, an output over the page's keys ascending, by one fused multiply-add each. So a query has the same
// bits in a prefill chunk of any size, in a decode step of any number of rows, and with any padding.
// A masked key has weight +0, which changes no sum. A sink comes before all keys.
//
// Online softmax over pages: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "layout.h"
#include "vectors.h"

namespace LOGPROBD_NAMESPACE {

static_assert(kPage == 4 * kLanes, "SoftmaxWeights holds a page's scores in four vectors");
constexpr int64_t kQueryTokens = 32;  // tokens of a block: each page is converted once for all of them

struct Pages {
  const int32_t* tables;     // [R, P]
  const int32_t* positions;  // [R, T], -1 is padding
  const float* queries;      // [R, T, H, E]
  const void* keys;          // [N, K, S, E]
  const void* values;        // [N, K, S, E]
  float* out;                // [R, T, H * E]
  int64_t rows, tokens, heads, kv_heads, size, table, pages;
  int64_t window;  // keys that a query attends to, itself included; 0 = all
  float scale;         // of a score
  float cap;           // replaces a score by cap * tanh(score / cap); 0 = off
  const float* sinks;  // [H] a further score of each head, whose value is zero; null = none
};

// Tokens [from, to) of all R * T in order. They have one table: rows of one request may follow each other.
struct Block {
  int64_t from, to;
};

struct Unit {
  Block block;
  int64_t head;  // all queries of this key/value head
};

// True if the rows of two tokens have the same pages up to the second token's position.
inline bool SharesTable(const Pages& p, int64_t first, int64_t second) {
  const int64_t row = first / p.tokens, other = second / p.tokens;
  const int64_t pages = (p.positions[second] + kPage) / kPage;
  return row == other ||
         std::equal(p.tables + row * p.table, p.tables + row * p.table + pages, p.tables + other * p.table);
}

// All tokens in blocks, in reverse order: the last ones of a chunk attend to the most keys, and start first.
inline std::vector<Block> BlocksOf(const Pages& p) {
  std::vector<Block> blocks;
  for (int64_t token = 0; token < p.rows * p.tokens; ++token) {
    const bool joins = !blocks.empty() && blocks.back().to - blocks.back().from < kQueryTokens &&
                       SharesTable(p, blocks.back().from, token);
    if (!joins) blocks.push_back({token, token});
    blocks.back().to = token + 1;
  }
  std::reverse(blocks.begin(), blocks.end());
  return blocks;
}

struct alignas(64) Line {
  float lane[kLanes];
};

// Buffers of one thread, reused for all its units. Ep is E rounded up to whole vectors.
class Scratch {
 public:
  Scratch(int64_t queries, int64_t size)
      : padded((size + kLanes - 1) / kLanes * kLanes),
        lines_(static_cast<size_t>((kPage * size + kPage * padded + queries * (padded * 2 + kPage + 3 * kLanes)) /
                                   kLanes)) {
    float* next = lines_.data()->lane;
    const auto take = [&next](int64_t count) { return std::exchange(next, next + count); };
    keys = take(size * kPage);
    values = take(kPage * padded);
    query = take(queries * padded);
    sum = take(queries * padded);
    weight = take(queries * kPage);
    total = take(queries * kLanes);
    best = take(queries * kLanes);
    scale = take(queries * kLanes);
  }

  const int64_t padded;
  float* keys;    // [E, S] the page's keys, transposed
  float* values;  // [S, Ep]
  float* query;   // [Q, Ep] times the scale
  float* sum;     // [Q, Ep]
  float* weight;  // [Q, S] scores, then exp(score - best)
  float* total;   // [Q, 16] sums of weights, by lane
  float* best;    // [Q] the best score so far
  float* scale;   // [Q] factor of the sums over earlier pages

 private:
  std::vector<Line> lines_;
};

// Converts the first `valid` slots of a page to floats. Later slots may hold values of an earlier owner: zeros.
template <typename Element>
void Convert(const Element* keys, const Element* values, int64_t size, int64_t valid, const Scratch& to) {
  for (int64_t s = 0; s < kPage; s += kLanes) {
    for (int64_t e = 0; e < size; e += 2) {  // rotary embedding requires an even head size
      const Pairs both = GatherPairs(keys + s * size + e, size, valid - s);
      Store(to.keys + e * kPage + s, both.first);
      Store(to.keys + (e + 1) * kPage + s, both.second);
    }
  }
  for (int64_t s = 0; s < valid; ++s) {
    for (int64_t e = 0; e < size; e += kLanes) {
      Store(to.values + s * to.padded + e, LoadSome(values + s * size + e, size - e));
    }
  }
}

// Scores of kRows queries against kVectors times 16 slots of a page, from slot `first` on.
template <int kRows, int kVectors>
LOGPROBD_INLINE void ScoresOf(int64_t query, int64_t first, int64_t size, const Scratch& scratch) {
  Floats acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Zeros();
  }
  const float* q = scratch.query + query * scratch.padded;
  for (int64_t e = 0; e < size; ++e) {
    Floats k[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) k[v] = Load(scratch.keys + e * kPage + first + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Floats x = Fill(q[r * scratch.padded + e]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Fma(x, k[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) Store(scratch.weight + (query + r) * kPage + first + v * kLanes, acc[r][v]);
  }
}

template <int kRows>
void Scores(int64_t query, int64_t size, const Scratch& scratch) {
  for (int64_t s = 0; s < kPage; s += kTileVectors * kLanes) ScoresOf<kRows, kTileVectors>(query, s, size, scratch);
}

// Replaces scores by weights and updates best, total and scale. The query attends to slots [first, last) of the page.
LOGPROBD_INLINE void SoftmaxWeights(int64_t query, int64_t first, int64_t last, float cap, const Scratch& scratch) {
  float* weights = scratch.weight + query * kPage;
  if (std::max<int64_t>(first, 0) >= last) {
    std::fill_n(weights, kPage, 0.0f);
    scratch.scale[query] = 1.0f;
    return;
  }
  Floats score[4], top = Fill(scratch.best[query]);
  for (int v = 0; v < 4; ++v) {
    const Floats raw = Load(weights + v * kLanes), masked = Fill(-std::numeric_limits<float>::infinity());
    const Floats capped = cap > 0 ? SoftCap(raw, Fill(cap)) : raw;
    const Floats causal = Choose(FirstLanes(last - v * kLanes), capped, masked);
    score[v] = Choose(FirstLanes(first - v * kLanes), masked, causal);
    top = Max(top, score[v]);
  }
  const float best = MaxOf(top);
  const Floats scale = ExpOfNegative(Fill(scratch.best[query] - best));
  for (int v = 0; v < 4; ++v) {
    score[v] = ExpOfNegative(Sub(score[v], Fill(best)));
    Store(weights + v * kLanes, score[v]);
  }
  const Floats sum = Add(Add(score[0], score[1]), Add(score[2], score[3]));
  float* total = scratch.total + query * kLanes;
  Store(total, Fma(Load(total), scale, sum));
  scratch.best[query] = best;
  float scales[kLanes];
  Store(scales, scale);
  scratch.scale[query] = scales[0];
}

// sum = sum * scale + weights x values, for kRows queries and kVectors vectors of the head from element e on.
template <int kRows, int kVectors>
LOGPROBD_INLINE void Accumulate(int64_t query, int64_t e, int64_t valid, const Scratch& scratch) {
  Floats acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    const Floats scale = Fill(scratch.scale[query + r]);
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = Mul(Load(scratch.sum + (query + r) * scratch.padded + e + v * kLanes), scale);
    }
  }
  const float* weights = scratch.weight + query * kPage;
  for (int64_t s = 0; s < valid; ++s) {
    Floats value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) value[v] = Load(scratch.values + s * scratch.padded + e + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Floats weight = Fill(weights[r * kPage + s]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Fma(weight, value[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) Store(scratch.sum + (query + r) * scratch.padded + e + v * kLanes, acc[r][v]);
  }
}

template <int kRows>
void AccumulateAll(int64_t query, int64_t valid, const Scratch& scratch) {
  constexpr int64_t kWide = kTileVectors * kLanes;
  int64_t e = 0;
  for (; e + kWide <= scratch.padded; e += kWide) Accumulate<kRows, kTileVectors>(query, e, valid, scratch);
  for (; e < scratch.padded; e += kLanes) Accumulate<kRows, 1>(query, e, valid, scratch);
}

// Calls tile(query, number of queries as a constant) until all queries are covered, six at a time.
template <typename Tile>
LOGPROBD_INLINE void ForTiles(int64_t queries, Tile tile) {
  int64_t q = 0;
  for (; q + 6 <= queries; q += 6) tile(q, std::integral_constant<int, 6>());
  if (q + 3 <= queries) {
    tile(q, std::integral_constant<int, 3>());
    q += 3;
  }
  for (; q < queries; ++q) tile(q, std::integral_constant<int, 1>());
}

// The queries of a unit and their positions, by [token, head of the group].
struct Queries {
  int64_t group, count, first, last;  // first and last: the lowest and highest position, -1 if all are padding
  const int32_t* positions;           // [tokens]
  int64_t position(int64_t query) const { return positions[query / group]; }
};

inline Queries Begin(const Pages& p, const Unit& unit, const Scratch& scratch) {
  const int64_t group = p.heads / p.kv_heads;
  const auto [from_token, to_token] = unit.block;
  Queries queries = {group, (to_token - from_token) * group, -1, -1, p.positions + from_token};
  for (int64_t t = 0; t < to_token - from_token; ++t) {
    const int64_t position = queries.positions[t];
    if (position < 0) continue;
    queries.first = queries.first < 0 ? position : std::min(queries.first, position);
    queries.last = std::max(queries.last, position);
  }
  const Floats factor = Fill(p.scale);
  for (int64_t q = 0; q < queries.count; ++q) {
    const int64_t token = from_token + q / group;
    const float* from = p.queries + (token * p.heads + unit.head * group + q % group) * p.size;
    for (int64_t e = 0; e < scratch.padded; e += kLanes) {
      Store(scratch.query + q * scratch.padded + e, Mul(LoadSome(from + e, p.size - e), factor));
      Store(scratch.sum + q * scratch.padded + e, Zeros());
    }
    Store(scratch.total + q * kLanes, Zeros());
    scratch.best[q] = -std::numeric_limits<float>::infinity();
    if (p.sinks != nullptr) {
      scratch.total[q * kLanes] = 1.0f;
      scratch.best[q] = p.sinks[unit.head * group + q % group];
    }
  }
  return queries;
}

inline void Finish(const Pages& p, const Unit& unit, const Queries& queries, const Scratch& scratch) {
  for (int64_t q = 0; q < queries.count; ++q) {
    const int64_t token = unit.block.from + q / queries.group;
    float* to = p.out + (token * p.heads + unit.head * queries.group + q % queries.group) * p.size;
    const bool padding = queries.position(q) < 0;
    const Floats total = Fill(padding ? 1.0f : SumOf(Load(scratch.total + q * kLanes)));
    for (int64_t e = 0; e < p.size; e += kLanes) {
      // + 0, since a weight of +0 may have turned a -0 sum into +0.
      const Floats mean = Div(Load(scratch.sum + q * scratch.padded + e), total);
      StoreSome(to + e, p.size - e, Add(mean, Zeros()));
    }
  }
}

template <typename Element>
void Attend(const Pages& p, const Unit& unit, const Scratch& scratch) {
  const Queries queries = Begin(p, unit, scratch);
  const int32_t* table = p.tables + unit.block.from / p.tokens * p.table;
  const int64_t seen_from = p.window > 0 ? std::max<int64_t>(0, queries.first - p.window + 1) : 0;
  for (int64_t page = seen_from / kPage; page * kPage <= queries.last; ++page) {
    const int64_t start = page * kPage, valid = std::min(kPage, queries.last + 1 - start);
    const int64_t id = table[page];
    const int64_t offset = (id * p.kv_heads + unit.head) * kPage * p.size;
    Convert(static_cast<const Element*>(p.keys) + offset, static_cast<const Element*>(p.values) + offset, p.size, valid,
            scratch);
    ForTiles(queries.count, [&](int64_t q, auto rows) { Scores<rows()>(q, p.size, scratch); });
    for (int64_t q = 0; q < queries.count; ++q) {
      const int64_t position = queries.position(q);
      SoftmaxWeights(q, p.window > 0 ? position - p.window + 1 - start : 0, std::min(valid, position + 1 - start),
                     p.cap, scratch);
    }
    ForTiles(queries.count, [&](int64_t q, auto rows) { AccumulateAll<rows()>(q, valid, scratch); });
  }
  Finish(p, unit, queries, scratch);
}

}  // namespace LOGPROBD_NAMESPACE
