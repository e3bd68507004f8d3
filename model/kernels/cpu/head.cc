// Log-probs, ranks and top-k of tokens, as handlers of XLA's foreign function interface: from logits, or from hidden
// states and the head's packed weight without storing a row of logits. head.h has the arithmetic and its promise.

#include "head.h"

#include <map>
#include <memory>
#include <optional>
#include <utility>

#include "handlers.h"
#include "parallel.h"
#include "product.h"
#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace {

using namespace logprobd;
using namespace LOGPROBD_NAMESPACE;

// Checks the results of a call and fills them with zeros, which is what padding rows keep; no value if they do not fit.
std::optional<TokenLogprobs> MakeOutputs(int64_t rows, int64_t vocab, const S32& ids, const S32& requested_ids,
                                         Live live, ffi::RemainingRets& results) {
  const auto logprob = results.get<F32>(0), top_logprobs = results.get<F32>(3);
  const auto requested_logprobs = results.get<F32>(4);
  const auto normalizer = results.get<F32>(6);
  const auto rank = results.get<S32>(1), top_ids = results.get<S32>(2), requested_ranks = results.get<S32>(5);
  for (const auto* floats : {&logprob, &top_logprobs, &requested_logprobs, &normalizer}) {
    if (!floats->has_value()) return std::nullopt;
    std::fill_n((**floats)->typed_data(), (**floats)->element_count(), 0.0f);
  }
  for (const auto* counts : {&rank, &top_ids, &requested_ranks}) {
    if (!counts->has_value()) return std::nullopt;
    std::fill_n((**counts)->typed_data(), (**counts)->element_count(), 0);
  }
  const auto top = (*top_ids)->dimensions(), requested = requested_ids.dimensions();
  const auto all = static_cast<size_t>(rows);
  const bool fits = top.size() == 2 && requested.size() == 2 && top[0] == rows && requested[0] == rows &&
                    ids.element_count() == all && vocab > 0 && top[1] <= vocab && (*logprob)->element_count() == all &&
                    (*rank)->element_count() == all && (*normalizer)->element_count() == all &&
                    (*top_logprobs)->element_count() == (*top_ids)->element_count() &&
                    (*requested_logprobs)->element_count() == requested_ids.element_count() &&
                    (*requested_ranks)->element_count() == requested_ids.element_count();
  if (!fits) return std::nullopt;
  return TokenLogprobs{std::clamp<int64_t>(*live.typed_data(), 0, rows),
                       vocab,
                       top[1],
                       requested[1],
                       ids.typed_data(),
                       requested_ids.typed_data(),
                       (*logprob)->typed_data(),
                       (*rank)->typed_data(),
                       (*top_ids)->typed_data(),
                       (*top_logprobs)->typed_data(),
                       (*requested_logprobs)->typed_data(),
                       (*requested_ranks)->typed_data(),
                       (*normalizer)->typed_data()};
}

ffi::Error FromLogits(ffi::ThreadPool pool, F32 logits, S32 ids, S32 requested_ids, Live live,
                      ffi::RemainingRets results) {
  const auto size = logits.dimensions();
  if (size.size() != 2) return ffi::Error::InvalidArgument("logprobs takes logits [R, V]");
  const auto outputs = MakeOutputs(size[0], size[1], ids, requested_ids, live, results);
  if (!outputs) {
    return ffi::Error::InvalidArgument("logprobs takes ids [R], requested ids [R, B], top k of V at most");
  }
  auto accumulator = std::make_shared<Accumulator>(*outputs);
  const float* from = logits.typed_data();
  const int64_t vocab = size[1], rows = outputs->rows;
  for (int64_t r = 0; r < rows; ++r) {
    for (Token& token : accumulator->rows[static_cast<size_t>(r)].tokens) token.logit = from[r * vocab + token.id];
  }
  return Outcome(ComputeTokenLogprobs(pool, accumulator, [from, vocab, rows](int64_t panel, int64_t, auto accumulate) {
    for (int64_t r = 0; r < rows; ++r) accumulate(r, from + r * vocab + panel * kPanel);
  }));
}

// The head's product.
struct Head {
  Product product;
  float cap;  // bound of the logits, 0 = none
};

// Computes the logits [M, count] of rows [row, row + m) in columns [first, first + count), by the linear kernel's panels.
void Logits(const Head& head, int64_t row, int64_t m, int64_t first, int64_t count, float* y) {
  Problem part = Columns(head.product.problem, first, count, y);
  part.m = m;
  part.x = static_cast<const char*>(part.x) + row * part.row_bytes;
  head.product.panel(part, 0, (count + kColumns - 1) / kColumns);
  if (head.cap > 0) SoftCapRow(y, head.cap, m * count, y);
}

struct RowToken {
  int64_t row;
  Token* token;
};

// Computes the logits of all tokens that are ranked: they must be known before panels are counted. Tokens in one block
// of columns share one product, over the rows from the first to the last of them.
bool ComputeTokenLogits(ffi::ThreadPool pool, const std::shared_ptr<Accumulator>& accumulator, const Head& head) {
  std::map<int64_t, std::vector<RowToken>> by_block;
  for (int64_t r = 0; r < accumulator->call.rows; ++r) {
    for (Token& token : accumulator->rows[static_cast<size_t>(r)].tokens) {
      by_block[token.id / kColumns].push_back({r, &token});
    }
  }
  auto blocks = std::make_shared<std::vector<std::vector<RowToken>>>();
  for (auto& [block, tokens] : by_block) blocks->push_back(std::move(tokens));
  const auto count = static_cast<int64_t>(blocks->size());
  return Share(pool, std::min<int64_t>(pool.num_threads(), count), count, [blocks, head](int64_t from, int64_t to) {
    const FloatMode mode;
    for (int64_t i = from; i < to; ++i) {
      const std::vector<RowToken>& tokens = (*blocks)[static_cast<size_t>(i)];
      const int64_t first = tokens.front().token->id / kColumns * kColumns, row = tokens.front().row;
      const int64_t columns = std::min(kColumns, head.product.problem.n - first), m = tokens.back().row - row + 1;
      std::vector<float> y(static_cast<size_t>(m * columns));
      Logits(head, row, m, first, columns, y.data());
      for (const RowToken& entry : tokens) {
        entry.token->logit = y[static_cast<size_t>((entry.row - row) * columns + entry.token->id - first)];
      }
    }
  });
}

ffi::Error FromHidden(ffi::ThreadPool pool, ffi::AnyBuffer hidden, U32 words, ffi::AnyBuffer scales, S32 ids,
                      S32 requested_ids, Live live, ffi::RemainingRets results, int64_t vocab, float cap,
                      std::string_view format) {
  return Guarded([&]() -> ffi::Error {
    const auto xs = hidden.dimensions();
    std::optional<Product> product;
    if (xs.size() == 2) {
      const int64_t rows = std::clamp<int64_t>(*live.typed_data(), 0, xs[0]);
      product = MakeProduct(pool, hidden, {words, scales, format}, rows, vocab);
    }
    if (!product) return ffi::Error::InvalidArgument("score takes hidden [M, K] and a packed weight [V, K]");
    const auto outputs = MakeOutputs(xs[0], vocab, ids, requested_ids, live, results);
    if (!outputs) return ffi::Error::InvalidArgument("score takes ids [M], requested ids [M, B], top k of V at most");
    const int64_t rows = outputs->rows;
    if (rows == 0) return ffi::Error::Success();
    auto accumulator = std::make_shared<Accumulator>(*outputs);
    const Head head = {*product, cap};
    if (!ComputeTokenLogits(pool, accumulator, head)) return Outcome(false);
    return Outcome(ComputeTokenLogprobs(pool, accumulator, [head, rows](int64_t panel, int64_t count, auto accumulate) {
      std::vector<float> logits(static_cast<size_t>(rows * count));
      Logits(head, 0, rows, panel * kPanel, count, logits.data());
      for (int64_t r = 0; r < rows; ++r) accumulate(r, logits.data() + r * count);
    }));
  });
}

}  // namespace

// The results, in order: log-prob, rank, top ids, top log-probs, requested log-probs, requested ranks, normalizer.
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_logprobs, FromLogits, (Bind<F32, S32, S32, Live>().RemainingRets()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_score, FromHidden,
                              (Bind<ffi::AnyBuffer, U32, ffi::AnyBuffer, S32, S32, Live>()
                                   .RemainingRets()
                                   .Attr<int64_t>("vocab")
                                   .Attr<float>("cap")
                                   .Attr<std::string_view>("format")));
