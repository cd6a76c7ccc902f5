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

 private:
  CudaMemory* memory_ = nullptr;
  uint8_t* data_ = nullptr;
  bool shared_ = false;
  size_t uncounted_ = 0;
};

class CudaMemory {
 public:
  CudaMemory() : properties(cuda::open()) {}

  // On a GPU that shares the processor's memory records are read to where its kernels find them; others get copies.
  std::unique_ptr<DeviceMemory> filled(size_t bytes, int lanes, size_t piece, bool again);

  const cuda::Properties properties;
  size_t uncounted = 0;  // bytes
};

}  // namespace edge_moe
