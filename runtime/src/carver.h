// Named pieces of one block of memory, whose size a plan can be told beforehand.
#pragma once

#include <cstdint>

#include "../../devices/format.h"

namespace edge_moe {

// Gives out consecutive aligned pieces of a block of memory; with none, only counts them.
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
