// The device that a model is computed on, the processor or a GPU: it allocates memory and does the model's arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "../../devices/kernels.h"

namespace edge_moe {

class LayerMath;
class ThreadPool;
class Trunk;
struct EngineConfig;
struct EngineMemory;

// Memory that storage is read into: in place by the host where possible, else piece by piece through a host buffer.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;

  virtual uint8_t* data() const = 0;  // the device's address; the host may not be able to read there

  // Call read(to), which has to write `bytes` bytes at `to` (4096-byte aligned, as `at` is), and bring them to data() +
  // at before returning. Throws what `read` throws. Calls with different lanes may run concurrently.
  virtual void fill(int lane, size_t at, size_t bytes, const std::function<void(uint8_t*)>& read) = 0;

  // No fill() follows: frees what only fill() needs.
  virtual void filled() {}

  // Resize to `bytes`, at most the `room` it was made with; nobody may use the memory meanwhile. What is given up is
  // returned to the system. Returns how many of the first bytes are unchanged. Throws SystemError if there is not
  // enough memory: the size is then the old one, or 0.
  virtual size_t resize(size_t bytes) = 0;
  virtual size_t bytes() const = 0;

  // Copy `bytes` bytes from data() + at to host memory.
  virtual void copy_out(size_t at, size_t bytes, void* to) const = 0;
};

class Device {
 public:
  virtual ~Device() = default;

  virtual const char* name() const = 0;  // of its kernels

  // The host's kernels, for routing, which the host does for every device.
  virtual const Kernels& host() const = 0;
  virtual bool multiplies(const Encoding& e) const { return host().find(e.codec, e.width); }

  // Allocate `bytes` of memory that can be resized up to `room`. It is filled from `lanes` lanes at once, at most
  // `piece` bytes per fill(); `again`: repeatedly, not just once. Throws SystemError if there is not enough memory.
  virtual std::unique_ptr<DeviceMemory> memory(size_t bytes, size_t room, int lanes, size_t piece,
                                               bool again) const = 0;

  // The arithmetic of a model, whose trunk is in this device's memory and outlives it.
  virtual std::unique_ptr<LayerMath> math(const EngineConfig& config, const Trunk& trunk, ThreadPool& pool) const = 0;

  // Bytes allocated through this device that the system does not count as this process's.
  virtual size_t uncounted_bytes() const { return 0; }

  // Whether the host reads records straight to where kernels use them; if not, each is copied once more.
  virtual bool in_place() const { return true; }

  // Whether kernels can use records in the memory map of their files.
  virtual bool reads_maps() const { return true; }
};

std::unique_ptr<Device> cpu_device(const Kernels& kernels);

}  // namespace edge_moe
