// Named pieces of one block of memory, whose size can be computed before the block is allocated.
#pragma once

#include <cstdint>

#include "../../devices/format.h"

namespace edge_moe {

// Hands out consecutive aligned pieces of a block of memory; with a null block, only counts their bytes.
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}

  template <typename T>
  void carve(T*& pointer, size_t count) {
    pointer = reinterpret_cast<T*>(base_ + used_);
    used_ = align_up(used_ + count * sizeof(T), kPartAlignment);
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

}  // namespace edge_moe
