// The numbers of tokens, as handlers of XLA's foreign function interface: from logits, or from hidden states and the
// head's packed weight without ever holding a row of logits. head.h has the arithmetic and its promise.

#include "head.h"

#include <map>
#include <memory>
#include <utility>

#include "outcome.h"
#include "parallel.h"
#include "rows.h"
#include "weight.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using Ids = ffi::Buffer<ffi::S32>;
// The results of a call, checked and cleared: padded rows are zeros. Rows are cut to the live ones.
struct Request {
  Numbers numbers;
  bool fits;
};

Request MakeRequest(int64_t rows, int64_t vocab, const Ids& ids, const Ids& named_ids, ffi::BufferR0<ffi::S32> live,
                    ffi::RemainingRets& results) {
  const auto logprob = results.get<ffi::Buffer<ffi::F32>>(0), top_logprobs = results.get<ffi::Buffer<ffi::F32>>(3);
  const auto named_logprobs = results.get<ffi::Buffer<ffi::F32>>(4), normalizer = results.get<ffi::Buffer<ffi::F32>>(6);
  const auto rank = results.get<Ids>(1), top_ids = results.get<Ids>(2), named_ranks = results.get<Ids>(5);
  for (const auto* floats : {&logprob, &top_logprobs, &named_logprobs, &normalizer}) {
    if (!floats->has_value()) return {{}, false};
    std::fill_n((**floats)->typed_data(), (**floats)->element_count(), 0.0f);
  }
  for (const auto* counts : {&rank, &top_ids, &named_ranks}) {
    if (!counts->has_value()) return {{}, false};
    std::fill_n((**counts)->typed_data(), (**counts)->element_count(), 0);
  }
  const auto top = (*top_ids)->dimensions(), named = named_ids.dimensions();
  const auto all = static_cast<size_t>(rows);
  const bool fits = top.size() == 2 && named.size() == 2 && top[0] == rows && named[0] == rows &&
                    ids.element_count() == all && vocab > 0 && top[1] <= vocab && (*logprob)->element_count() == all &&
                    (*rank)->element_count() == all && (*normalizer)->element_count() == all &&
                    (*top_logprobs)->element_count() == (*top_ids)->element_count() &&
                    (*named_logprobs)->element_count() == named_ids.element_count() &&
                    (*named_ranks)->element_count() == named_ids.element_count();
  if (!fits) return {{}, false};
  return {{std::clamp<int64_t>(*live.typed_data(), 0, rows), vocab, top[1], named[1], ids.typed_data(),
           named_ids.typed_data(), (*logprob)->typed_data(), (*rank)->typed_data(), (*top_ids)->typed_data(),
           (*top_logprobs)->typed_data(), (*named_logprobs)->typed_data(), (*named_ranks)->typed_data(),
           (*normalizer)->typed_data()},
          true};
}

ffi::Error FromLogits(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, Ids ids, Ids named_ids,
                      ffi::BufferR0<ffi::S32> live, ffi::RemainingRets results) {
  const auto size = logits.dimensions();
  if (size.size() != 2) return ffi::Error::InvalidArgument("numbers takes logits [R, V]");
  const Request request = MakeRequest(size[0], size[1], ids, named_ids, live, results);
  if (!request.fits) return ffi::Error::InvalidArgument("numbers takes ids [R], named ids [R, B], top k of V at most");
  auto tally = std::make_shared<Tally>(request.numbers);
  const float* from = logits.typed_data();
  const int64_t vocab = size[1], rows = request.numbers.rows;
  for (int64_t r = 0; r < rows; ++r) {
    for (Token& token : tally->rows[static_cast<size_t>(r)].tokens) token.own = from[r * vocab + token.id];
  }
  return Outcome(Gather(pool, tally, [from, vocab, rows](int64_t panel, int64_t, auto take) {
    for (int64_t r = 0; r < rows; ++r) take(r, from + r * vocab + panel * kPanel);
  }));
}

// The head's product, and the bound of its logits: 0 where there is none.
struct Head {
  Problem whole;
  TileTable tiles;
  float cap;
};

// The logits of all rows in columns [first, first + count), by the tiles of the linear kernel: y [M, count].
void Logits(const Head& head, int64_t first, int64_t count, float* y) {
  const Problem part = Columns(head.whole, first, count, y);
  for (int64_t block = 0; block < part.blocks; ++block) Compute(part, head.tiles, block, block + 1 < part.blocks);
  if (head.cap > 0) SoftCapRow(y, head.cap, part.m * count, y);
}

struct Asked {
  int64_t row;
  Token* token;
};

// The logits of the tokens that are asked for, which must be known before the panels are counted. What lies in one
// block of columns comes from one product, of the rows from the first to the last that ask.
bool OwnLogits(ffi::ThreadPool pool, const std::shared_ptr<Tally>& tally, const Head& head) {
  std::map<int64_t, std::vector<Asked>> by_block;
  for (int64_t r = 0; r < tally->numbers.rows; ++r) {
    for (Token& token : tally->rows[static_cast<size_t>(r)].tokens) {
      by_block[token.id / kColumns].push_back({r, &token});
    }
  }
  auto blocks = std::make_shared<std::vector<std::vector<Asked>>>();
  for (auto& [block, asked] : by_block) blocks->push_back(std::move(asked));
  const auto count = static_cast<int64_t>(blocks->size());
  return Share(pool, std::min<int64_t>(pool.num_threads(), count), count,
               [blocks, head](int64_t from, int64_t to) {
                 const FloatMode mode;
                 for (int64_t i = from; i < to; ++i) {
                   const std::vector<Asked>& asked = (*blocks)[static_cast<size_t>(i)];
                   const int64_t first = asked.front().token->id / kColumns * kColumns, row = asked.front().row;
                   const int64_t columns = std::min(kColumns, head.whole.n - first);
                   Head some = head;
                   some.whole.x += row * head.whole.k;
                   some.whole.m = asked.back().row - row + 1;
                   std::vector<float> y(static_cast<size_t>(some.whole.m * columns));
                   Logits(some, first, columns, y.data());
                   for (const Asked& one : asked) {
                     one.token->own = y[static_cast<size_t>((one.row - row) * columns + one.token->id - first)];
                   }
                 }
               });
}

ffi::Error Score(TileTable tiles, ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> hidden, const Weight& weight, Ids ids,
                 Ids named_ids, ffi::BufferR0<ffi::S32> live, ffi::RemainingRets results, int64_t vocab,
                 float cap) {
  const auto xs = hidden.dimensions();
  if (xs.size() != 2 || !weight.Fits(vocab, xs[1])) {
    return ffi::Error::InvalidArgument("score takes hidden [M, K] and a packed weight [V, K]");
  }
  const Request request = MakeRequest(xs[0], vocab, ids, named_ids, live, results);
  if (!request.fits) return ffi::Error::InvalidArgument("score takes ids [M], named ids [M, B], top k of V at most");
  const int64_t rows = request.numbers.rows;
  if (rows == 0) return ffi::Error::Success();
  auto tally = std::make_shared<Tally>(request.numbers);
  const Head head = {weight.MakeProblem(hidden.typed_data(), nullptr, false, rows, vocab, xs[1]), tiles, cap};
  if (!OwnLogits(pool, tally, head)) return Outcome(false);
  return Outcome(Gather(pool, tally, [head, rows](int64_t panel, int64_t count, auto take) {
    std::vector<float> logits(static_cast<size_t>(rows * count));
    Logits(head, panel * kPanel, count, logits.data());
    for (int64_t r = 0; r < rows; ++r) take(r, logits.data() + r * count);
  }));
}

ffi::Error FromHidden(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> hidden, ffi::Buffer<ffi::BF16> w, Ids ids,
                      Ids named_ids, ffi::BufferR0<ffi::S32> live, ffi::RemainingRets results, int64_t vocab, float cap) {
  return Score(FastestTiles(), pool, hidden, PairsOf(w), ids, named_ids, live, results, vocab, cap);
}

ffi::Error FromHiddenInt8(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> hidden, ffi::Buffer<ffi::S8> w,
                          ffi::Buffer<ffi::F16> scales, Ids ids, Ids named_ids, ffi::BufferR0<ffi::S32> live,
                          ffi::RemainingRets results, int64_t vocab, float cap) {
  return Score(Int8Tiles(), pool, hidden, Int8Of(w, scales), ids, named_ids, live, results, vocab, cap);
}

}  // namespace

// The results, in order: log-prob, rank, top ids, top log-probs, named log-probs, named ranks, normalizer.
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_numbers, FromLogits,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<Ids>()
                                  .Arg<Ids>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_score, FromHidden,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<Ids>()
                                  .Arg<Ids>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .RemainingRets()
                                  .Attr<int64_t>("vocab")
                                  .Attr<float>("cap"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_score_int8, FromHiddenInt8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<Ids>()
                                  .Arg<Ids>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .RemainingRets()
                                  .Attr<int64_t>("vocab")
                                  .Attr<float>("cap"));
