// The processor's memory as a DeviceMemory: storage is read straight into it.
#pragma once

#include <algorithm>
#include <cstring>

#include "device.h"
#include "os.h"

namespace edge_moe {

class HostMemory : public DeviceMemory {
 public:
  HostMemory(size_t bytes, size_t room) : arena_(bytes, room) {}
  uint8_t* data() const override { return arena_.data(); }
  void fill(int, size_t at, size_t, const std::function<void(uint8_t*)>& read) override { read(arena_.data() + at); }
  size_t resize(size_t bytes) override {
    const size_t before = arena_.bytes();
    arena_.resize(bytes);
    return std::min(before, bytes);
  }
  size_t bytes() const override { return arena_.bytes(); }
  void copy_out(size_t at, size_t bytes, void* to) const override { std::memcpy(to, arena_.data() + at, bytes); }

 private:
  Arena arena_;
};

}  // namespace edge_moe
