// What experts.metal needs of Metal, as C++ for the fibers of the simulated GPU: a threadgroup is a block, a simdgroup
// a warp. test_mlx_kernels.py puts this before the kernels' text.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../../devices/cuda/simt.h"

namespace simt = edge_moe::cuda::simt;
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
struct uint3 {
  uint x, y, z;
};
using std::exp;
using std::fabs;
using std::fma;
using std::max;
using std::min;
using std::sqrt;

template <typename A, typename B>
A as_type(B value) {
  static_assert(sizeof(A) == sizeof(B));
  A result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

template <typename T, typename Combine>
T over_lanes(T value, const Combine& combine) {
  for (int other = 16; other; other /= 2) value = combine(value, __shfl_xor_sync(~0u, value, other));
  return value;
}
inline float simd_sum(float value) {
  return over_lanes(value, [](float a, float b) { return a + b; });
}
inline float simd_max(float value) {
  return over_lanes(value, [](float a, float b) { return std::max(a, b); });
}
inline int simd_min(int value) {
  return over_lanes(value, [](int a, int b) { return std::min(a, b); });
}

enum class mem_flags { mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { simt::barrier_of_block(); }

// A thread's attributes.
inline uint lane_of_thread() { return simt::thread.x % 32; }
inline uint simdgroup_of_thread() { return simt::thread.x / 32; }
inline uint thread_of_group() { return simt::thread.x; }
inline uint3 group_of_grid() { return {simt::block.x, simt::block.y, simt::block.z}; }

#define device
#define constant static
#define thread
#define threadgroup
