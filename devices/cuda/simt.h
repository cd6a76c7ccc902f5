// The language of kernels: CUDA under nvcc, and elsewhere a slow stand-in, so that their logic can be tested on
// machines without a GPU. The stand-in runs a launch's blocks one after another and each block's threads as fibers that
// yield at barriers and shuffles. A stream's work runs as late as allowed: when the host waits for it. Only tests build
// the stand-in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define EDGE_MOE_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define EDGE_MOE_UNROLL _Pragma("unroll")
#define EDGE_MOE_UNROLL_4 _Pragma("unroll 4")
#define EDGE_MOE_UNROLL_8 _Pragma("unroll 8")
#define EDGE_MOE_NO_UNROLL _Pragma("unroll 1")
#define EDGE_MOE_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...)                   \
  (kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   edge_moe::cuda::check_launch())
// Shared memory whose size the launch determines.
#define EDGE_MOE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8_t name[]

namespace edge_moe::cuda {

// Bytes of the eight in `low` and `high`, chosen by the lower three bits of each of the selector's lower four nibbles.
__device__ __forceinline__ uint32_t choose_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector & 0x7777);
}

// sum + the dot product of four unsigned and four signed bytes
__device__ __forceinline__ int dot_bytes(uint32_t codes, uint32_t inputs, int sum) {
  int result;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(codes), "r"(inputs), "r"(sum));
  return result;
}

// sums (16 x 8) += codes (16 x 32) . inputs (32 x 8), unsigned and signed bytes, by a warp. In PTX's order of
// fragments: with r = lane/4 and c = lane%4, a lane has the codes of rows r and r + 8, from columns 4c and 4c + 16 on;
// the inputs of column r, from rows 4c and 4c + 16 on; and the sums of rows r and r + 8 in columns 2c and 2c + 1.
__device__ __forceinline__ void multiply_tiles(const uint32_t (&codes)[4], const uint32_t (&inputs)[2],
                                               int (&sums)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "r"(inputs[0]), "r"(inputs[1]));
}

}  // namespace edge_moe::cuda

#else

#include <cmath>
#include <cstring>
#include <functional>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define EDGE_MOE_KERNEL(threads) inline void
#define EDGE_MOE_UNROLL
#define EDGE_MOE_UNROLL_4
#define EDGE_MOE_UNROLL_8
#define EDGE_MOE_NO_UNROLL
#define EDGE_MOE_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  edge_moe::cuda::simt::put(                                              \
      stream, [=] { edge_moe::cuda::simt::launch(grid, threads, shared_bytes, [=] { kernel(__VA_ARGS__); }); })
#define EDGE_MOE_DYNAMIC_SHARED(name) uint8_t* const name = edge_moe::cuda::simt::dynamic_shared()

namespace edge_moe::cuda {

namespace simt {

struct Index {
  unsigned x = 1, y = 1, z = 1;
  Index(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern Index thread, block, block_size, grid_size;

uint8_t* dynamic_shared();
void barrier_of_block();
void barrier_of_warp();
uint64_t exchange(uint64_t value, int lane);  // every lane of a warp gives a value and takes another lane's

// Does `work` when the host waits for the stream, or at once if it is null.
void put(Stream stream, std::function<void()> work);

// Runs body() as every thread of a grid.
void launch(Index grid, Index threads, size_t shared_bytes, const std::function<void()>& body);

}  // namespace simt

inline uint32_t choose_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selector >> 4 * i & 7;
    chosen |= ((which < 4 ? low : high) >> which % 4 * 8 & 0xff) << 8 * i;
  }
  return chosen;
}

inline int dot_bytes(uint32_t codes, uint32_t inputs, int sum) {
  for (int i = 0; i < 4; ++i) sum += int(codes >> 8 * i & 0xff) * int(int8_t(inputs >> 8 * i & 0xff));
  return sum;
}

inline void multiply_tiles(const uint32_t (&codes)[4], const uint32_t (&inputs)[2], int (&sums)[4]) {
  static uint32_t of_warps[32][32][6];  // what every lane gives
  const unsigned lane = simt::thread.x % 32;
  auto& of_warp = of_warps[simt::thread.x / 32];
  for (int i = 0; i < 6; ++i) of_warp[lane][i] = i < 4 ? codes[i] : inputs[i - 4];
  simt::barrier_of_warp();
  for (int i = 0; i < 4; ++i)
    for (unsigned quarter = 0; quarter < 4; ++quarter)
      for (int part = 0; part < 2; ++part)
        sums[i] = dot_bytes(of_warp[lane / 4 * 4 + quarter][2 * part + i / 2],
                            of_warp[(lane % 4 * 2 + unsigned(i) % 2) * 4 + quarter][4 + part], sums[i]);
  simt::barrier_of_warp();
}

}  // namespace edge_moe::cuda

#define threadIdx edge_moe::cuda::simt::thread
#define blockIdx edge_moe::cuda::simt::block
#define blockDim edge_moe::cuda::simt::block_size
#define gridDim edge_moe::cuda::simt::grid_size

inline void __syncthreads() { edge_moe::cuda::simt::barrier_of_block(); }
inline void __syncwarp() { edge_moe::cuda::simt::barrier_of_warp(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = edge_moe::cuda::simt::exchange(bits, int(threadIdx.x % 32) ^ mask);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int atomicAdd(int* value, int more) {
  const int before = *value;
  *value += more;
  return before;
}

using dim3 = edge_moe::cuda::simt::Index;
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

#endif
