// Memory that a client of the core allocates, such as an array of another library, as a device that storage is read to.
// It computes nothing.
#pragma once

#include <cstring>
#include <functional>
#include <stdexcept>
#include <utility>

#include "device.h"
#include "layer_math.h"

namespace edge_moe {

// Returns so many bytes of memory, 4096-byte aligned. What the last call returned may be freed: nobody uses it.
using GiveMemory = std::function<uint8_t*(size_t bytes)>;

class GivenMemory : public DeviceMemory {
 public:
  GivenMemory(size_t bytes, GiveMemory give) : give_(std::move(give)) { resize(bytes); }
  uint8_t* data() const override { return data_; }
  void fill(int, size_t at, size_t, const std::function<void(uint8_t*)>& read) override { read(data_ + at); }
  size_t resize(size_t bytes) override {
    data_ = nullptr, bytes_ = 0;
    data_ = give_(bytes);
    bytes_ = bytes;
    return 0;
  }
  size_t bytes() const override { return bytes_; }
  void copy_out(size_t at, size_t bytes, void* to) const override { std::memcpy(to, data_ + at, bytes); }

 private:
  GiveMemory give_;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

class GivenDevice : public Device {
 public:
  GivenDevice(const Kernels& host, GiveMemory give) : host_(host), give_(std::move(give)) {}
  const char* name() const override { return "given"; }
  const Kernels& host() const override { return host_; }
  std::unique_ptr<DeviceMemory> memory(size_t bytes, size_t, int, size_t, bool) const override {
    return std::make_unique<GivenMemory>(bytes, give_);
  }
  std::unique_ptr<LayerMath> math(const EngineConfig&, const Trunk&, ThreadPool&) const override {
    throw std::logic_error("memory that is given computes nothing");
  }
  bool reads_maps() const override { return false; }

 private:
  const Kernels& host_;
  GiveMemory give_;
};

}  // namespace edge_moe
