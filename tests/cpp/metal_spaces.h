// What experts.metal needs of Metal, for a front end that checks types and address spaces and makes no code.
#pragma once

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long size_t;

#define INFINITY __builtin_inff()

struct uint3 {
  uint x, y, z;
};

template <typename A, typename B>
A as_type(B value) {
  return __builtin_bit_cast(A, value);
}

float exp(float);
float fabs(float);
float fma(float, float, float);
float sqrt(float);
template <typename T>
T min(T, T);
template <typename T>
T max(T, T);

float simd_sum(float);
float simd_max(float);
int simd_min(int);

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
