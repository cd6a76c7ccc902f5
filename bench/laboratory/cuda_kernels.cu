// Measures the share of a GPU's memory bandwidth and tensor core throughput that the kernels reach, relative to
// reading, copying and multiplying alone:
//
//     bench_cuda    prints one JSON object a line: what, and gbps read or tops, the median of the rounds
//
// The weights exceed the caches, and each launch uses others than the one before. Nothing depends on the values.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../devices/cuda/latent.h"
#include "../../devices/cuda/prefill.h"
#include "../../devices/cuda/simt.h"

using namespace edge_moe;

namespace {

constexpr int kRounds = 9;
constexpr int kGroup = 64;
constexpr size_t kWeights = size_t(1) << 30;  // bytes from which launches take their matrices

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Allocates device memory, filled with one byte value.
template <typename T>
T* device(size_t count, int byte = 0) {
  void* memory = cuda::allocate(count * sizeof(T));
  check(cudaMemset(memory, byte, count * sizeof(T)));
  return static_cast<T*>(memory);
}

cudaStream_t stream;

// Seconds of launch(i): the median over rounds of `launches` launches.
template <typename Launch>
double seconds(int launches, const Launch& launch) {
  cudaEvent_t began, ended;
  check(cudaEventCreate(&began)), check(cudaEventCreate(&ended));
  std::vector<double> took;
  for (int round = 0; round <= kRounds; ++round) {
    check(cudaEventRecord(began, stream));
    for (int i = 0; i < launches; ++i) launch(round * launches + i);
    check(cudaEventRecord(ended, stream));
    check(cudaEventSynchronize(ended));
    float ms;
    check(cudaEventElapsedTime(&ms, began, ended));
    if (round) took.push_back(ms / 1e3 / launches);  // the first round is a warm-up
  }
  check(cudaEventDestroy(began)), check(cudaEventDestroy(ended));
  std::sort(took.begin(), took.end());
  return took[took.size() / 2];
}

void tell(const std::string& what, const char* unit, double value) {
  std::printf("{\"what\": \"%s\", \"%s\": %.2f}\n", what.c_str(), unit, value);
  std::fflush(stdout);
}

// ---- ceilings

EDGE_MOE_KERNEL(256) read_kernel(const uint4* values, size_t count, uint32_t* out) {
  uint32_t sum = 0;
  EDGE_MOE_UNROLL_8
  for (size_t i = size_t(blockIdx.x) * 256 + threadIdx.x; i < count; i += size_t(gridDim.x) * 256) {
    const uint4 four = values[i];
    sum ^= four.x ^ four.y ^ four.z ^ four.w;
  }
  if (sum == 1) *out = sum;
}

constexpr int kSteps = 2048, kTiles = 8;

EDGE_MOE_KERNEL(128) tiles_kernel(int* out) {
  uint32_t codes[4] = {threadIdx.x, 1, 2, 3}, inputs[2] = {threadIdx.x, 5};
  int sums[kTiles][4] = {};
  EDGE_MOE_NO_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    EDGE_MOE_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) cuda::multiply_tiles(codes, inputs, sums[tile]);
  }
  int all = 0;
  EDGE_MOE_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) all ^= sums[tile][0] ^ sums[tile][1] ^ sums[tile][2] ^ sums[tile][3];
  if (all == 1) *out = all;
}

void ceilings(int multiprocessors, const uint8_t* weights, uint32_t* out) {
  tell("read", "gbps", kWeights / 1e9 / seconds(4, [&](int) {
                         read_kernel<<<multiprocessors * 8, 256, 0, stream>>>(reinterpret_cast<const uint4*>(weights),
                                                                              kWeights / 16, out);
                       }));
  uint8_t* to = device<uint8_t>(kWeights / 2);
  tell("copy, read and written", "gbps",
       kWeights / 1e9 / seconds(4, [&](int) {
         check(cudaMemcpyAsync(to, weights, kWeights / 2, cudaMemcpyDeviceToDevice, stream));
       }));
  cuda::release(to);
  const unsigned blocks = unsigned(multiprocessors) * 8;
  tell("tensor cores on bytes", "tops", 2.0 * 16 * 8 * 32 * kTiles * kSteps * 4 * blocks / 1e12 / seconds(4, [&](int) {
                                          tiles_kernel<<<blocks, 128, 0, stream>>>(reinterpret_cast<int*>(out));
                                        }));
}

// ---- products

size_t matrix_bytes(int rows, int cols, int width) {
  return size_t(rows) * cols * width / 8 + size_t(rows) * (cols / kGroup) * 4;
}

// The matrix at a place of the weights, aligned to 256 bytes.
Matrix matrix_at(const uint8_t* weights, size_t place, int rows, int cols, int width) {
  const size_t bytes = (matrix_bytes(rows, cols, width) + 255) / 256 * 256, places = kWeights / bytes;
  Matrix m;
  m.codes = weights + place % places * bytes;
  m.scales = reinterpret_cast<const uint16_t*>(m.codes + size_t(rows) * cols * width / 8);
  m.biases = m.scales + size_t(rows) * (cols / kGroup);
  m.rows = rows, m.cols = cols, m.width = width, m.group = kGroup;
  return m;
}

cuda::VectorBuffer vectors(int count, int cols) {
  cuda::VectorBuffer x{};
  x.cols = cols;
  const size_t blocks = count * x.blocks();
  x.codes = device<int8_t>(blocks * kBlock, 1), x.lows = device<int8_t>(blocks * kBlock, 1);
  x.two_planes = device<uint8_t>(blocks), x.scales = device<float>(blocks);
  x.sums[0] = device<float>(2 * blocks), x.sums[1] = device<float>(blocks);
  return x;
}

void release(cuda::VectorBuffer& x) {
  for (void* memory : {static_cast<void*>(x.codes), static_cast<void*>(x.lows), static_cast<void*>(x.two_planes),
                       static_cast<void*>(x.scales), static_cast<void*>(x.sums[0]), static_cast<void*>(x.sums[1])})
    cuda::release(memory);
}

struct Shape {
  const char* name;
  int dim, hidden, chosen, experts;
};

void decode(const Shape& s, int width, const uint8_t* weights) {
  cuda::VectorBuffer x = vectors(1, s.dim), hidden = vectors(s.chosen, s.hidden);
  float *out = device<float>(size_t(s.chosen) * s.dim), *residual = device<float>(s.dim);
  cuda::RankedSum sum = {residual, s.chosen, s.dim, {}, {}};
  for (int k = 0; k < s.chosen; ++k) sum.pairs[k] = k;
  std::vector<cuda::ExpertJob> jobs(s.chosen);
  const auto choose = [&](int launch) {
    for (int i = 0; i < s.chosen; ++i) {
      const size_t place = size_t(launch) * s.chosen + i;
      jobs[i] = {matrix_at(weights, 2 * place, s.hidden, s.dim, width),
                 matrix_at(weights, 2 * place + 1, s.hidden, s.dim, width),
                 matrix_at(weights, place, s.dim, s.hidden, width), 0, i};
    }
  };
  const double bytes = double(s.chosen) * matrix_bytes(s.hidden, s.dim, width);
  const std::string what = std::string(s.name) + ", " + std::to_string(width) + " bits, ";
  tell(what + "gate and up", "gbps", 2 * bytes / 1e9 / seconds(50, [&](int launch) {
                                       choose(launch);
                                       cuda::gate_up(jobs.data(), s.chosen, s.hidden, x, hidden, {}, stream);
                                     }));
  tell(what + "down", "gbps", bytes / 1e9 / seconds(50, [&](int launch) {
                                choose(launch);
                                cuda::down(jobs.data(), s.chosen, hidden, out, sum, stream);
                              }));
  const int rows = 4096;
  float* y = device<float>(rows);
  tell(what + "4096 rows", "gbps", matrix_bytes(rows, s.dim, width) / 1e9 / seconds(50, [&](int launch) {
                                     const cuda::ProductJob job =
                                         cuda::whole(matrix_at(weights, launch, rows, s.dim, width), 1, y);
                                     cuda::product(&job, 1, x, stream);
                                   }));
  release(x), release(hidden);
  for (float* memory : {out, residual, y}) cuda::release(memory);
}

void prefill(const Shape& s, int width, const uint8_t* weights) {
  const int tokens = 512, pairs = tokens * s.chosen, each = std::max(1, pairs / s.experts);
  cuda::VectorBuffer x = vectors(tokens, s.dim);
  float* out = device<float>(size_t(each) * s.experts * s.hidden);
  int32_t* chosen = device<int32_t>(size_t(each) * s.experts);
  std::vector<cuda::ProductJob> jobs(s.experts);
  for (int i = 0; i < s.experts; ++i)
    jobs[i] = {matrix_at(weights, i, s.hidden, s.dim, width),
               out + size_t(i) * each * s.hidden,
               size_t(s.hidden),
               chosen + size_t(i) * each,
               0,
               1,
               each};
  const std::string what = std::string(s.name) + ", " + std::to_string(width) + " bits, 512 tokens, ";
  tell(what + "all experts' gates", "tops", 2.0 * s.experts * each * s.hidden * s.dim / 1e12 / seconds(5, [&](int) {
                                              cuda::products(jobs.data(), s.experts, x, stream);
                                            }));
  const int rows = 4096;
  float* y = device<float>(size_t(tokens) * rows);
  tell(what + "4096 rows", "tops", 2.0 * tokens * rows * s.dim / 1e12 / seconds(5, [&](int launch) {
                                     const cuda::ProductJob job =
                                         cuda::whole(matrix_at(weights, launch, rows, s.dim, width), tokens, y);
                                     cuda::products(&job, 1, x, stream);
                                   }));
  release(x);
  cuda::release(out), cuda::release(chosen), cuda::release(y);
}

// ---- attention of one token over a long context

void attention(int context) {
  const cuda::Heads heads = {32, 4, 128, 128, 128, 1e-6f, 0, 0.09f, 0, false, false, false, nullptr};
  const size_t layers = 16, layer = size_t(heads.kv_heads) * context * heads.head_dim * 2;
  uint8_t *keys = device<uint8_t>(layers * layer), *values = device<uint8_t>(layers * layer);
  float *q = device<float>(heads.heads * heads.head_dim), *out = device<float>(heads.heads * heads.head_dim);
  float* scores = device<float>(size_t(heads.heads) * context);
  int32_t* position = device<int32_t>(1);
  const int32_t last = context - 1;
  check(cudaMemcpy(position, &last, sizeof(last), cudaMemcpyHostToDevice));
  const std::string what = "Qwen3-30B-A3B, attention over " + std::to_string(context) + " positions";
  tell(what, "gbps", 2 * layer / 1e9 / seconds(16, [&](int launch) {
                       const size_t at = launch % layers * layer;
                       cuda::attend(q, heads, {keys + at, values + at, size_t(context), true, size_t(context)},
                                    {position, 0, 1, last}, scores, out, stream);
                     }));
  for (void* memory : {static_cast<void*>(keys), static_cast<void*>(values), static_cast<void*>(q),
                       static_cast<void*>(out), static_cast<void*>(scores), static_cast<void*>(position)})
    cuda::release(memory);
}

}  // namespace

int main() try {
  const cuda::Properties gpu = cuda::open();
  stream = static_cast<cudaStream_t>(cuda::make_stream());
  uint8_t* weights = device<uint8_t>(kWeights + (64 << 20), 0x11);
  uint32_t* out = device<uint32_t>(1);
  ceilings(gpu.multiprocessors, weights, out);
  for (const Shape& shape : {Shape{"Qwen3-30B-A3B", 2048, 768, 8, 128}, Shape{"DeepSeek-V3", 7168, 2048, 8, 256}}) {
    for (int width : {1, 2, 3, 4, 5, 6, 8}) decode(shape, width, weights);
    for (int width : {2, 4, 8}) prefill(shape, width, weights);
  }
  for (int context : {1024, 4096, 16384}) attention(context);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
