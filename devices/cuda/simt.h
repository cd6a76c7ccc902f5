// What kernels are written in: CUDA itself under nvcc, and elsewhere a slow stand-in, so that their logic is tested on
// machines without a GPU. The stand-in runs a launch's blocks one after the other and each block's threads as fibers
// that give way at barriers and shuffles; tests alone include it so.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define EDGE_MOE_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define EDGE_MOE_UNROLL _Pragma("unroll")
#define EDGE_MOE_UNROLL_4 _Pragma("unroll 4")
#define EDGE_MOE_NO_UNROLL _Pragma("unroll 1")
#define EDGE_MOE_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  kernel<<<grid, threads, shared_bytes, stream>>>(__VA_ARGS__)
// Shared memory of a size that the launch names.
#define EDGE_MOE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8_t name[]

namespace edge_moe::cuda {

using Stream = cudaStream_t;

// sum + the dot product of four unsigned and four signed bytes
__device__ __forceinline__ int dot_bytes(uint32_t codes, uint32_t inputs, int sum) {
  int result;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(codes), "r"(inputs), "r"(sum));
  return result;
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
#define EDGE_MOE_NO_UNROLL
#define EDGE_MOE_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  (void(stream), edge_moe::cuda::simt::launch(grid, threads, shared_bytes, [&] { kernel(__VA_ARGS__); }))
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

// Run body() as every thread of a grid.
void launch(Index grid, Index threads, size_t shared_bytes, const std::function<void()>& body);

}  // namespace simt

using Stream = void*;

inline int dot_bytes(uint32_t codes, uint32_t inputs, int sum) {
  for (int i = 0; i < 4; ++i) sum += int(codes >> 8 * i & 0xff) * int(int8_t(inputs >> 8 * i & 0xff));
  return sum;
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

using dim3 = edge_moe::cuda::simt::Index;
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

#endif
