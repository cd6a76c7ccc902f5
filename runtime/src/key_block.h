// Storing keys in the KV cache, in blocks of kKeyBlock positions: (blocks, dim, kKeyBlock).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../../devices/half.h"
#include "../../devices/kernels.h"

namespace edge_moe {

// A value as the cache has it: a half (uint16_t) or a float.
template <typename T>
T as_cached(float x) {
  if constexpr (std::is_same_v<T, uint16_t>)
    return float_to_half(x);
  else
    return x;
}

// Store the key of the position at a place of the cache.
template <typename T>
void store_key(T* keys, size_t place, const float* key, size_t dim) {
  keys += place / kKeyBlock * dim * kKeyBlock;
  for (size_t i = 0; i < dim; ++i) keys[i * kKeyBlock + place % kKeyBlock] = as_cached<T>(key[i]);
}

}  // namespace edge_moe
