// Products of spike matrices on the CPU: pack spikes to bits, then add up the rows that the bits select.
//
// Two calls for XLA's foreign function interface. `Pack` turns a float matrix of zeros and ones into one bit per entry
// and says whether it was one, and sparse enough. `Gather` adds rows. Every sum runs in the order of the indices
// whatever the number of threads, so that results do not depend on it.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// As many floats as one register holds, which need not be aligned. Wider than a register they would be kept in memory.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
constexpr int kWidest = 8;  // vectors of an output row that are summed in registers
constexpr int64_t kBits = 64;

// Rows of the source that a pass reads: with kWidest vectors of each they fit into the second-level cache.
constexpr int64_t kPass = 1024;

// What threads share of a call: the next block to take, and how many are done.
struct Progress {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
};

// Runs body(block) for every block, on the caller's thread and on those of XLA's pool that come to help. The caller
// waits for blocks that others have begun, never for a helper to begin: it may itself hold the pool's last thread.
template <typename Body>
void ForBlocks(ffi::ThreadPool& pool, int64_t threads, int64_t blocks, const Body& body) {
  auto progress = std::make_shared<Progress>();
  auto work = [progress, blocks, &body] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < blocks;) {
      body(i);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  if (threads == 0) threads = pool.num_threads();
  for (int64_t helper = 1; helper < std::min(threads, blocks); ++helper) {
    auto copy = work;
    pool.Schedule(std::move(copy));
  }
  work();
  while (progress->done.load(std::memory_order_acquire) < blocks) std::this_thread::yield();
}

// Up to 64 floats as bits; `strange` counts entries that are neither 0 nor 1.
uint64_t PackWord(const float* x, int64_t n, uint64_t& strange) {
  uint8_t fires[kBits] = {};
  uint8_t other[kBits] = {};
  auto look = [&](int64_t i) {
    fires[i] = x[i] != 0.0f;
    other[i] = (x[i] != 0.0f) & (x[i] != 1.0f);
  };
  if (n == kBits) {
    for (int64_t i = 0; i < kBits; ++i) look(i);
  } else {
    for (int64_t i = 0; i < n; ++i) look(i);
  }
  uint64_t word = 0;
  for (int64_t i = 0; i < kBits; i += 8) {
    uint64_t eight, wrong;
    std::memcpy(&eight, fires + i, 8);
    std::memcpy(&wrong, other + i, 8);
    word |= (eight * 0x0102040810204080u >> 56) << i;  // the lowest bit of each byte, side by side
    strange |= wrong;
  }
  return word;
}

// Transposes 64 x 64 bits in place (recursive exchange of halves).
void Transpose(uint64_t* words) {
  uint64_t mask = 0x00000000ffffffffu;
  for (int half = 32; half; half >>= 1, mask ^= mask << half) {
    for (int i = 0; i < kBits; i = (i + half + 1) & ~half) {
      uint64_t swap = ((words[i] >> half) ^ words[i + half]) & mask;
      words[i] ^= swap << half;
      words[i + half] ^= swap;
    }
  }
}

// x [rows, columns] -> bits: row by row, or column by column (`transposed`), whole 64-bit words, in the order of the
// machine; sparse: every entry is 0 or 1, and at most `most` are 1.
ffi::Error Pack(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::U32> bits,
                ffi::ResultBuffer<ffi::PRED> sparse, bool transposed, int64_t most, int64_t threads) {
  const int64_t rows = x.dimensions()[0], columns = x.dimensions()[1];
  const int64_t across = (columns + kBits - 1) / kBits, down = (rows + kBits - 1) / kBits;
  const float* from = x.typed_data();
  auto* to = reinterpret_cast<uint64_t*>(bits->typed_data());
  std::atomic<int64_t> ones{0};
  std::atomic<bool> foreign{false};
  ForBlocks(pool, threads, down, [&](int64_t block) {
    if (foreign.load(std::memory_order_relaxed)) return;  // somebody multiplies them in the dense way: no need to pack
    const int64_t first = block * kBits, last = std::min(first + kBits, rows);
    int64_t count = 0;
    uint64_t strange = 0;
    for (int64_t word = 0; word < across; ++word) {
      const int64_t at = word * kBits, n = std::min(kBits, columns - at);
      uint64_t square[kBits] = {};
      for (int64_t row = first; row < last; ++row) {
        const uint64_t packed = PackWord(from + row * columns + at, n, strange);
        count += __builtin_popcountll(packed);
        if (transposed) square[row - first] = packed;
        else to[row * across + word] = packed;
      }
      if (!transposed) continue;
      Transpose(square);
      for (int64_t column = 0; column < n; ++column) to[(at + column) * down + block] = square[column];
    }
    ones += count;
    if (strange) foreign = true;
  });
  *sparse->typed_data() = !foreign && ones <= most;
  return ffi::Error::Success();
}

// One row of the output, kWidth vectors of it: the sum of the chosen rows of the source.
template <int kWidth>
void AddRows(const int32_t* chosen, int64_t n, const float* source, int64_t stride, float* out, bool begin) {
  Lanes sum[kWidth];
  for (int j = 0; j < kWidth; ++j) {
    if (begin) sum[j] = Lanes{};
    else std::memcpy(&sum[j], out + j * kLanes, sizeof(Lanes));
  }
  for (int64_t i = 0; i < n; ++i) {
    const float* row = source + chosen[i] * stride;
    for (int j = 0; j < kWidth; ++j) sum[j] += *reinterpret_cast<const Lanes*>(row + j * kLanes);
  }
  std::memcpy(out, sum, sizeof sum);
}

// A tile of the output: rows [first, last), kWidth vectors of columns.
template <int kWidth>
void Tile(const uint64_t* bits, int64_t words, int64_t first, int64_t last, const float* source, int64_t stride,
          float* out, int64_t out_stride) {
  int32_t chosen[kPass];
  const int64_t words_per_pass = kPass / kBits;
  for (int64_t pass = 0; pass < words; pass += words_per_pass) {
    const int64_t until = std::min(pass + words_per_pass, words);
    for (int64_t row = first; row < last; ++row) {
      int64_t n = 0;
      for (int64_t word = pass; word < until; ++word) {
        for (uint64_t left = bits[row * words + word]; left; left &= left - 1) {
          chosen[n++] = static_cast<int32_t>(word * kBits) + __builtin_ctzll(left);
        }
      }
      AddRows<kWidth>(chosen, n, source, stride, out + (row - first) * out_stride, pass == 0);
    }
  }
}

// The last columns, fewer than one vector: through copies of the source and of the output that are one vector wide.
void NarrowTile(const uint64_t* bits, int64_t words, int64_t first, int64_t last, const float* padded, int64_t columns,
                float* out, int64_t out_stride) {
  std::vector<float> wide((last - first) * kLanes);
  Tile<1>(bits, words, first, last, padded, kLanes, wide.data(), kLanes);
  for (int64_t row = 0; row < last - first; ++row) {
    std::memcpy(out + row * out_stride, wide.data() + row * kLanes, columns * sizeof(float));
  }
}

// bits [rows, 2 words], source [n, columns] -> out [rows, columns]: out_r = sum of the source's rows i with bit (r, i).
ffi::Error Gather(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> bits, ffi::Buffer<ffi::F32> source,
                  ffi::ResultBuffer<ffi::F32> out, int64_t threads) {
  const int64_t rows = bits.dimensions()[0], words = bits.dimensions()[1] / 2;
  const int64_t n = source.dimensions()[0], columns = source.dimensions()[1];
  const auto* packed = reinterpret_cast<const uint64_t*>(bits.typed_data());
  const float* from = source.typed_data();
  float* to = out->typed_data();
  const int64_t narrow = columns % kLanes, wide = columns - narrow;
  std::vector<float> padded(narrow ? n * kLanes : 0);
  for (int64_t i = 0; narrow && i < n; ++i) {
    std::memcpy(&padded[i * kLanes], from + i * columns + wide, narrow * sizeof(float));
  }
  const int64_t tall = 64;  // rows of the output in a block
  const int64_t down = (rows + tall - 1) / tall, step = kWidest * kLanes;
  const int64_t across = (columns + step - 1) / step;
  ForBlocks(pool, threads, down * across, [&](int64_t block) {
    const int64_t first = block % down * tall, last = std::min(first + tall, rows);
    int64_t column = block / down * step;
    const int64_t end = std::min(column + step, wide);
    float* at = to + first * columns;
    auto tile = [&](auto add, int64_t width) {
      add(packed, words, first, last, from + column, columns, at + column, columns);
      column += width * kLanes;
    };
    if (column + step <= end) tile(Tile<kWidest>, kWidest);
    if (column + 4 * kLanes <= end) tile(Tile<4>, 4);
    if (column + 2 * kLanes <= end) tile(Tile<2>, 2);
    if (column + kLanes <= end) tile(Tile<1>, 1);
    if (narrow && column == wide && wide < (block / down + 1) * step) {
      NarrowTile(packed, words, first, last, padded.data(), narrow, at + wide, columns);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PackHandler, Pack,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::Buffer<ffi::PRED>>()
                                  .Attr<bool>("transposed")
                                  .Attr<int64_t>("most")
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(GatherHandler, Gather,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("threads"));
