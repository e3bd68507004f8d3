// y[M, N] = x[M, K] W[N, K]^T for bfloat16 x and packed bfloat16 W, as handlers of XLA's foreign function interface.
// tiles.h has the layout of W, the arithmetic and its promise; here is how a call is shared among XLA's own threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "tiles.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int64_t kClaims = 4;                 // a claim is a thread's share of the blocks left, over this
constexpr int64_t kMinBytesToShare = 1 << 16;  // waking a thread takes longer than reading less of W than this
constexpr int64_t kMaxRowsAlone = 16;          // or than the arithmetic of so few rows

// What the threads of one call share. It outlives the call: a task that the pool starts late finds no block left.
struct Job {
  Problem problem;
  TileTable tiles;
  int64_t threads;
  std::atomic<int64_t> claimed{0};
  std::atomic<int64_t> finished{0};
};

void Compute(const Job& job, int64_t block, bool more) {
  const Problem& p = job.problem;
  const int64_t tiles = (p.m + kMaxRows - 1) / kMaxRows;
  const uint16_t* here = p.w + block * p.pairs * kPair;
  const uint16_t* next = more ? here + p.pairs * kPair : here;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = p.m * t / tiles, rows = p.m * (t + 1) / tiles - row;
    // The first tiles fetch the next block: its even lines, then its odd lines.
    const uint16_t* line0 = t == 0 ? next : here;
    const uint16_t* line1 = (t == 1 || tiles == 1 ? next : here) + kColumns;
    job.tiles[rows - 1](p, {row, block, {line0, line1}});
  }
}

// Takes blocks until none is left: large claims first, so that reads run on, then small ones, so that all end together.
void Work(Job& job) {
  const FloatMode mode;
  const int64_t blocks = job.problem.blocks;
  int64_t first = job.claimed.load();
  while (first < blocks) {
    const int64_t last = first + std::max<int64_t>(1, (blocks - first) / (kClaims * job.threads));
    if (!job.claimed.compare_exchange_weak(first, last)) continue;
    for (int64_t block = first; block < last; ++block) Compute(job, block, block + 1 < last);
    job.finished.fetch_add(last - first);
    first = job.claimed.load();
  }
}

int64_t Threads(const Problem& p, int64_t in_pool) {
  const int64_t bytes = p.blocks * p.pairs * kPair * static_cast<int64_t>(sizeof(*p.w));
  if (bytes < kMinBytesToShare && p.m <= kMaxRowsAlone) return 1;
  return std::max<int64_t>(1, std::min(in_pool, p.blocks));
}

ffi::Error Run(TileTable tiles, ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> w,
               ffi::Result<ffi::AnyBuffer> y) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 4 || ys.size() != 2 || ws[2] != kColumns || ws[3] != 2 || xs[0] != ys[0] ||
      (xs[1] + 1) / 2 != ws[1] || (ys[1] + kColumns - 1) / kColumns != ws[0]) {
    return ffi::Error::InvalidArgument("linear takes x [M, K], w [ceil(N/32), ceil(K/2), 32, 2] and gives y [M, N]");
  }
  const bool bf16 = y->element_type() == ffi::BF16;
  if (!bf16 && y->element_type() != ffi::F32) return ffi::Error::InvalidArgument("linear gives bfloat16 or float32");
  auto job = std::make_shared<Job>();
  job->problem = {reinterpret_cast<const uint16_t*>(x.typed_data()), reinterpret_cast<const uint16_t*>(w.typed_data()),
                  y->untyped_data(), bf16, xs[0], ys[1], xs[1], ws[1], ws[0]};
  job->tiles = tiles;
  job->threads = Threads(job->problem, pool.num_threads());
  for (int64_t t = 1; t < job->threads; ++t) pool.Schedule([job] { Work(*job); });
  Work(*job);
  // Whatever is not finished was claimed by a thread that is at work on it: never a wait for a task to start.
  while (job->finished.load() < ws[0]) std::this_thread::yield();
  return ffi::Error::Success();
}

template <TileTable (*kTiles)()>
ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> w,
                  ffi::Result<ffi::AnyBuffer> y) {
  return Run(kTiles(), pool, x, w, y);
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::BF16>>()
      .Arg<ffi::Buffer<ffi::BF16>>()
      .Ret<ffi::AnyBuffer>();
}

}  // namespace

// The path that is fastest on this CPU, and each path by its name, which the tests compare.
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear, Linear<FastestTiles>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear_pairs, Linear<PairTiles>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear_floats, Linear<FloatTiles>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(logprobd_linear_portable, Linear<PortableTiles>, Binding());

// Whether the CPU can run the paths "pairs" and "floats": 1 or 0.
extern "C" int logprobd_has_pairs() { return HasPairs(); }
extern "C" int logprobd_has_floats() { return HasFloats(); }
