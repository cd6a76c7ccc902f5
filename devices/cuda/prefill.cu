// Products of many tokens: codes and inputs are bytes, so tensor cores give the exact integers of scalar.cpp.
//
// A thread block computes 64 rows by 64 tokens. For each block of 64 inputs, its threads unpack the rows' codes to
// bytes in shared memory and store the tokens' inputs in the same order; then every warp multiplies 16 rows by all
// tokens, and its lanes add the products to running sums, in the order of the inputs. If one of eight tokens has lows,
// all eight are multiplied again.
#include <algorithm>

#include "batch.h"
#include "packed.cuh"
#include "prefill.h"

namespace edge_moe::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 16 * kWarps;
constexpr int kTokens = 64;
constexpr int kTiles = kTokens / 8;   // of tokens
constexpr int kStride = kBlock + 16;  // bytes of a row or token in shared memory: eight of them use different banks
static_assert(kThreads == 2 * kRows && kThreads == 2 * kTokens);  // a thread unpacks half a block of each

struct alignas(16) Tiles {
  uint8_t codes[kRows * kStride];
  uint8_t inputs[kTokens * kStride], lows[kTokens * kStride];
  uint64_t two_planes[kTiles];  // a byte for each of a tile's tokens
  float scales[kTokens];        // of the tokens' block
  float sums[2][kTokens];       // of the groups that begin in the block: one, or two of 32
};

// Unpacks half a block of one row's codes to eight words.
template <int Codes>
__device__ void spread_codes(const uint8_t* codes, uint32_t* to) {
  uint32_t words[kBits<Codes>];
  EDGE_MOE_UNROLL
  for (int i = 0; i < kBits<Codes>; ++i) words[i] = reinterpret_cast<const uint32_t*>(codes)[i];
  EDGE_MOE_UNROLL
  for (int i = 0; i < 8; ++i) to[i] = four_codes<Codes>(words, i);
}

// The same for one plane of a token's inputs.
template <int Codes>
__device__ void spread_inputs(const int8_t* inputs, uint32_t* to) {
  uint32_t arranged[8];
  load_inputs<Codes>(inputs, arranged);
  EDGE_MOE_UNROLL
  for (int i = 0; i < 8; ++i) to[i] = arranged[i];
}

__device__ __forceinline__ uint32_t word_at(const uint8_t* tile, int line, int byte) {
  return *reinterpret_cast<const uint32_t*>(tile + line * kStride + byte);
}

EDGE_MOE_KERNEL(kThreads) products_kernel(Batch<ProductJob> batch, VectorBuffer x) {
  __shared__ Tiles tiles;
  __shared__ int vectors[kTokens];
  const ProductJob job = batch.jobs[blockIdx.z];
  const Matrix m = job.matrix;
  const int first_row = int(blockIdx.x) * kRows, first_token = int(blockIdx.y) * kTokens;
  if (first_token >= job.count || first_row >= m.rows) return;
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int blocks = int(x.blocks()), groups = m.cols / m.group;
  if (thread < kTokens)
    vectors[thread] = int(job.vector(first_token + thread < job.count ? first_token + thread : job.count - 1));
  __syncthreads();
  auto clamped = [&](int row) { return size_t(row < m.rows ? row : m.rows - 1); };

  // the row and token that this thread unpacks, and the two rows and sixteen tokens whose sums it has
  const int line = thread / 2, half = thread % 2;
  const uint8_t* codes = m.codes + clamped(first_row + line) * (size_t(m.cols) / 8 * m.width);
  const size_t inputs = size_t(vectors[line]) * blocks * kBlock;
  const int place = line * kStride + half * 32;  // in shared memory
  const int row = warp * 16 + lane / 4;
  const size_t group_rows[2] = {clamped(first_row + row) * groups, clamped(first_row + row + 8) * groups};
  float sums[kTiles][4] = {};

  for (int block = 0; block < blocks; ++block) {
    const int first = block * kBlock + half * 32;
    __syncthreads();
    const size_t at = size_t(vectors[line]) * blocks;
    const bool two = x.two_planes[at + block];
    if (first < m.cols)
      with_codes(m, [&](auto its) {
        constexpr int kCodes = decltype(its)::value;
        spread_codes<kCodes>(codes + size_t(first) / 8 * kBits<kCodes>,
                             reinterpret_cast<uint32_t*>(tiles.codes + place));
        spread_inputs<kCodes>(x.codes + inputs + first, reinterpret_cast<uint32_t*>(tiles.inputs + place));
        if (two) spread_inputs<kCodes>(x.lows + inputs + first, reinterpret_cast<uint32_t*>(tiles.lows + place));
      });
    const QuantisedVector token = {nullptr, nullptr, nullptr, nullptr, {x.sums[0] + 2 * at, x.sums[1] + at}};
    if (half == 0) tiles.scales[line] = x.scales[at + block];
    if (half == 1) reinterpret_cast<uint8_t*>(tiles.two_planes)[line] = two;
    if (m.group == 32 ? first < m.cols : half == 1 && block * kBlock % m.group == 0)
      tiles.sums[m.group == 32 ? half : 0][line] = group_sum(token, m.group, first / m.group, blocks);
    __syncthreads();
    // Parts of the block whose products share both scales: its halves, or the whole block.
    const int parts = m.group == 32 ? 2 : 1;
    uint32_t row_codes[2][4];
    EDGE_MOE_UNROLL
    for (int i = 0; i < 8; ++i)
      row_codes[i / 4][i % 4] = word_at(tiles.codes, row + i % 2 * 8, i / 4 * 32 + i % 4 / 2 * 16 + lane % 4 * 4);
    for (int part = 0; part < parts; ++part) {
      if (block * kBlock + part * 32 >= m.cols) break;
      const int group = (block * kBlock + part * 32) / m.group;
      const bool begins = (block * kBlock + part * 32) % m.group == 0;
      float scales[2], biases[2];
      EDGE_MOE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const size_t at = group_rows[i] + group;
        const uint32_t both = m.codec == Codec::kMxfp4 ? scale_and_bias<true>(m, at) : scale_and_bias<false>(m, at);
        scales[i] = from_bfloat16(uint16_t(both)), biases[i] = from_bfloat16(uint16_t(both >> 16));
      }
      EDGE_MOE_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        auto multiply = [&](const uint8_t* plane, int (&dots)[4]) {
          EDGE_MOE_UNROLL
          for (int of = 0; of < 2; ++of) {
            if (parts == 2 && of != part) continue;
            const int byte = of * 32 + lane % 4 * 4, token = tile * 8 + lane / 4;
            const uint32_t words[2] = {word_at(plane, token, byte), word_at(plane, token, byte + 16)};
            multiply_tiles(row_codes[of], words, dots);
          }
        };
        int dots[4] = {}, lows[4] = {};
        multiply(tiles.inputs, dots);
        const uint64_t two = tiles.two_planes[tile];
        if (two) multiply(tiles.lows, lows);
        EDGE_MOE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int token = tile * 8 + lane % 4 * 2 + i % 2;
          float& sum = sums[tile][i];
          if (begins) sum = fmaf(biases[i / 2], tiles.sums[part][token], sum);
          float dot = small_float(dots[i]);
          if (two >> token % 8 * 8 & 1) dot = fmaf(small_float(lows[i]), kLowStep, dot);
          sum = fmaf(dot, scales[i / 2] * tiles.scales[token], sum);
        }
      }
    }
  }
  EDGE_MOE_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    EDGE_MOE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int token = first_token + tile * 8 + lane % 4 * 2 + i % 2, to = first_row + row + i / 2 * 8;
      if (token < job.count && to < m.rows) job.y[token * job.stride + to] = sums[tile][i];
    }
  }
}

// For products_kernel, where it would take registers of which it has none left.
EDGE_MOE_KERNEL(kThreads) add_output_bias_kernel(Batch<ProductJob> batch) {
  const ProductJob& job = batch.jobs[blockIdx.z];
  const int row = int(blockIdx.x * kThreads + threadIdx.x), t = int(blockIdx.y);
  if (row >= job.matrix.rows || t >= job.count) return;
  float& y = job.y[t * job.stride + row];
  y = with_bias(job.matrix, row, y);
}

}  // namespace

void products(const ProductJob* jobs, int count, const VectorBuffer& x, Stream stream) {
  in_batches(jobs, count, [&](const Batch<ProductJob>& batch, bool) {
    dim3 grid = grid_of(batch, kRows);
    grid.y = pieces(grid.y, kTokens);
    if (!grid.x || !grid.y) return;
    EDGE_MOE_LAUNCH(products_kernel, grid, dim3(kThreads), 0, stream, batch, x);
    const auto biased = [](const ProductJob& job) { return job.matrix.output_bias != nullptr; };
    if (std::any_of(batch.jobs, batch.jobs + batch.count, biased))
      EDGE_MOE_LAUNCH(add_output_bias_kernel, grid_of(batch, kThreads), dim3(kThreads), 0, stream, batch);
  });
}

}  // namespace edge_moe::cuda
