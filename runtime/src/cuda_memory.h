// Memory on an NVIDIA GPU, and an account of what of it the system does not count as this process's.
#pragma once

#include "../../devices/cuda/device.h"
#include "device.h"

namespace edge_moe {

class CudaMemory;

// Some of it, of the GPU alone or shared with the processor.
class CudaBlock {
 public:
  CudaBlock() = default;
  CudaBlock(CudaMemory& memory, size_t bytes, bool shared);
  ~CudaBlock();
  CudaBlock(CudaBlock&& other) noexcept;
  CudaBlock& operator=(CudaBlock&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  // Another block of so many bytes in its place, which is given back first; where there is no memory for it, one of as
  // many as before.
  void replace(size_t bytes);

 private:
  CudaMemory* memory_ = nullptr;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  bool shared_ = false;
  size_t uncounted_ = 0;
};

// A stream for as long as this lives.
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

  // Memory that storage is read into: by the host itself where kernels find it and read it as fast, else piece by
  // piece.
  std::unique_ptr<DeviceMemory> filled(size_t bytes, int lanes, size_t piece, bool again);

  const cuda::Properties properties;
  size_t uncounted = 0;   // bytes
  bool in_place = false;  // does the host read records to where kernels find them?
};

}  // namespace edge_moe
