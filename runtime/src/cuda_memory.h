// Memory on an NVIDIA GPU, and how much of it the system does not count as this process's.
#pragma once

#include "../../devices/cuda/device.h"
#include "device.h"

namespace edge_moe {

class CudaMemory;

// A block of memory, of the GPU alone or shared with the processor.
class CudaBlock {
 public:
  CudaBlock() = default;
  CudaBlock(CudaMemory& memory, size_t bytes, bool shared);
  ~CudaBlock();
  CudaBlock(CudaBlock&& other) noexcept;
  CudaBlock& operator=(CudaBlock&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  // Free this block and allocate one of `bytes` bytes; if that fails, one of the old size.
  void replace(size_t bytes);

 private:
  CudaMemory* memory_ = nullptr;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  bool shared_ = false;
  size_t uncounted_ = 0;
};

// An owned stream.
class CudaStream {
 public:
  CudaStream() : stream_(cuda::make_stream()) {}
  ~CudaStream() { cuda::release_stream(stream_); }
  CudaStream(const CudaStream&) = delete;
  operator cuda::Stream() const { return stream_; }

 private:
  cuda::Stream stream_;
};

class CudaMemory {
 public:
  CudaMemory();

  // Memory that storage is read into: in place by the host where the GPU can read such memory as fast, else piece by
  // piece through a buffer.
  std::unique_ptr<DeviceMemory> filled(size_t bytes, int lanes, size_t piece, bool again);

  const cuda::Properties properties;
  size_t uncounted = 0;   // bytes
  bool in_place = false;  // whether the host reads records straight to where kernels use them
};

}  // namespace edge_moe
