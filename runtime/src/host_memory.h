// The processor's own memory as a device's: storage is read straight into it.
#pragma once

#include <cstring>

#include "device.h"
#include "os.h"

namespace edge_moe {

class HostMemory : public DeviceMemory {
 public:
  explicit HostMemory(size_t bytes) : arena_(bytes) {}
  uint8_t* data() const override { return arena_.data(); }
  void fill(int, size_t at, size_t, const std::function<void(uint8_t*)>& read) override { read(arena_.data() + at); }
  void copy_out(size_t at, size_t bytes, void* to) const override { std::memcpy(to, arena_.data() + at, bytes); }

 private:
  Arena arena_;
};

}  // namespace edge_moe
