// NumPy arrays in bindings: type aliases and the argument check.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels.h"

namespace nb = nanobind;

template <typename T, int Dims>
using ArrayIn = nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;

template <typename T>
using ArrayOut = nb::ndarray<nb::numpy, T, nb::c_contig>;

// A NumPy array that owns `values`.
template <typename T>
ArrayOut<T> to_numpy(std::vector<T>&& values, std::initializer_list<size_t> shape) {
  auto* owned = new std::vector<T>(std::move(values));
  nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return ArrayOut<T>(owned->data(), shape, owner);
}

// The kernel set of that name; throws std::invalid_argument if this machine has none. Defined in ../bind_kernels.cpp.
const edge_moe::Kernels& find_kernels(const std::string& name);

inline void expect(bool right, const std::string& message) {
  if (!right) throw std::invalid_argument(message);
}
