// What a model is computed on: the processor itself, or a GPU. It gives out its memory and the arithmetic of a model.
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

// Memory that storage is read into: by the host itself where it can, else piece by piece through memory of its own.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;

  virtual uint8_t* data() const = 0;  // where the device finds it; the host may not be able to read there

  // read(to) has to put `bytes` bytes at `to`, 4096-byte aligned as `at` is; they are at data() + at on return.
  // Throws what `read` throws. Calls with different lanes may run at once.
  virtual void fill(int lane, size_t at, size_t bytes, const std::function<void(uint8_t*)>& read) = 0;

  // No fill() comes any more: what only that needs may be given back.
  virtual void filled() {}

  // Memory of so many bytes from now on, at most the room that there was asked for; nobody may use it meanwhile. What
  // is given up is the system's again. Returns how many of the first bytes are as they were. Throws SystemError where
  // there is no more: then as much is there as before, or none.
  virtual size_t resize(size_t bytes) = 0;
  virtual size_t bytes() const = 0;

  // `bytes` bytes from data() + at to the host's memory.
  virtual void copy_out(size_t at, size_t bytes, void* to) const = 0;
};

class Device {
 public:
  virtual ~Device() = default;

  virtual const char* name() const = 0;  // of its kernels

  // The host's kernels, for what the host does for any device: routing.
  virtual const Kernels& host() const = 0;
  virtual bool multiplies(const Encoding& e) const { return host().find(e.codec, e.width); }

  // `bytes` of memory, to be resized to `room` at most, filled from `lanes` lanes at once by at most `piece` bytes
  // each, again and again or once for all. Throws SystemError when there is no more.
  virtual std::unique_ptr<DeviceMemory> memory(size_t bytes, size_t room, int lanes, size_t piece,
                                               bool again) const = 0;

  // A model's arithmetic; the trunk is in this device's memory and outlives it.
  virtual std::unique_ptr<LayerMath> math(const EngineConfig& config, const Trunk& trunk, ThreadPool& pool) const = 0;

  // Bytes that were allocated through it and that the system does not count as this process's.
  virtual size_t uncounted_bytes() const { return 0; }

  // Are records read by the host to where kernels find them? Else each is copied once more.
  virtual bool in_place() const { return true; }

  // Can it use records where they are mapped from their files?
  virtual bool reads_maps() const { return true; }
};

std::unique_ptr<Device> cpu_device(const Kernels& kernels);

}  // namespace edge_moe
