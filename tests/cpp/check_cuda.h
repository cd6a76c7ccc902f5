// Random matrices and vectors, and a comparison bit by bit: what the checks of the CUDA kernels share. All are in
// memory that both the processor and the GPU read.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../devices/cuda/decode.h"

using namespace edge_moe;

inline const Activation kActivations[] = {
    {Gate::kSilu},     {Gate::kGelu}, {Gate::kSigmoid}, {Gate::kClamped, 1.702f, 1.5f}, {Gate::kClamped, 1, 0.8f, 0},
    {Gate::kBilinear}, {Gate::kRelu2}};

void check_delta();    // check_cuda_delta.cpp
void check_layer();    // check_cuda_layer.cpp
void check_index();    // check_cuda_index.cpp
void check_latent();   // check_cuda_latent.cpp
void check_prefill();  // check_cuda_prefill.cpp
void check_rows();     // check_cuda_rows.cpp
void check_sparse();   // check_cuda_sparse.cpp
void check_streams();  // check_cuda_streams.cpp

template <typename T>
struct Shared {
  using value_type = T;
  Shared() = default;
  template <typename Other>
  Shared(const Shared<Other>&) {}
  T* allocate(size_t n) { return static_cast<T*>(cuda::allocate_shared(n * sizeof(T))); }
  void deallocate(T* values, size_t) { cuda::release_shared(values); }
  bool operator==(const Shared&) const { return true; }
};

template <typename T>
using Values = std::vector<T, Shared<T>>;
using Floats = Values<float>;

inline uint64_t state = 1;
inline int failures = 0, cases = 0;

inline uint32_t random_bits() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return uint32_t(state >> 32);
}

inline Floats floats(size_t n) {
  Floats values(n);
  for (float& value : values) value = float(int32_t(random_bits())) / 2147483648.0f;
  return values;
}

// The same bits; which not-a-number a processor makes is its own affair.
template <typename T>
bool same(const T& got, const T& want) {
  return std::memcmp(&got, &want, sizeof(T)) == 0 || (got != got && want != want);
}

template <typename T>
void compare(const std::string& what, const Values<T>& got, const Values<T>& want) {
  cuda::wait(nullptr);
  ++cases;
  if (std::equal(got.begin(), got.end(), want.begin(), want.end(), same<T>)) return;
  std::fprintf(stderr, "%s: not scalar's\n", what.c_str());
  ++failures;
}

inline constexpr int kMxfp4 = 0;  // instead of a width: a matrix of that codec, in groups of 32

// A random matrix of a packed width, with an output bias where that is even.
struct Packed {
  Packed(int rows, int cols, int width, int group)
      : codes(codes_bytes(rows, cols, width == kMxfp4 ? 4 : width)),
        scales(size_t(rows) * (cols / 32)),
        biases(scales.size()),
        output_bias(floats(size_t(rows))) {
    if (width == kMxfp4) matrix.codec = Codec::kMxfp4, width = 4, group = 32;
    for (uint8_t& code : codes) code = uint8_t(random_bits());
    for (auto* values : {&scales, &biases})
      for (uint16_t& value : *values) value = uint16_t((random_bits() & 0x80ff) | 0x3c00);
    if (matrix.codec == Codec::kMxfp4)
      for (uint16_t& two : scales) two = uint16_t(0x7070 + (random_bits() & 0x0f0f));
    matrix.codes = codes.data(), matrix.scales = scales.data(), matrix.biases = biases.data();
    matrix.rows = rows, matrix.cols = cols, matrix.width = width, matrix.group = group;
    if (width % 2 == 0) matrix.output_bias = output_bias.data();
  }
  Values<uint8_t> codes;
  Values<uint16_t> scales, biases;
  Floats output_bias;
  Matrix matrix;
};

// Vectors and their int8 forms, by scalar.cpp and in the layout of the kernels, which lack only the sums over 128.
struct Vectors {
  Vectors(int count, int cols, Floats given = {}) : values(std::move(given)), cols(cols) {
    const size_t blocks = size_t(cols + kBlock - 1) / kBlock;
    if (values.empty()) {
      values = floats(size_t(count) * cols);
      for (size_t block = 0; block < count * blocks; ++block)  // inputs far above the others, in some of the blocks
        if (random_bits() % 3 == 0) values[block / blocks * cols + block % blocks * kBlock] *= 3000;
    }
    codes.resize(count * blocks * kBlock), lows.resize(codes.size()), scales.resize(count * blocks);
    two_planes.resize(count * blocks);
    for (int i = 0; i < 3; ++i) sums[i].resize(count * (i == 0 ? 2 * blocks : i == 1 ? blocks : (blocks + 1) / 2));
  }
  void quantise() {
    for (size_t t = 0; t * cols < values.size(); ++t)
      kScalarKernels.quantise(&values[t * cols], cols, quantised().from(t, cols));
  }
  Quantised quantised() {
    return {
        codes.data(), lows.data(), two_planes.data(), scales.data(), {sums[0].data(), sums[1].data(), sums[2].data()}};
  }
  Activations activations(int first, int count) {
    Activations x;
    x.values = &values[size_t(first) * cols], x.quantised = quantised().from(size_t(first), cols);
    x.count = count, x.cols = cols;
    return x;
  }
  cuda::VectorBuffer buffer() {
    return {codes.data(), lows.data(), two_planes.data(), scales.data(), {sums[0].data(), sums[1].data()}, cols};
  }
  Floats values, scales, sums[3];
  Values<int8_t> codes, lows;
  Values<uint8_t> two_planes;
  int cols;
};
