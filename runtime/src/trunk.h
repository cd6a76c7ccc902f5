// The trunk in a device's memory: trunk.safetensors is read whole at load; tensors are found by name.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../../devices/kernels.h"
#include "device.h"
#include "interrupt.h"

namespace edge_moe {

// One trunk tensor and the layout of its parts in the file. A vector has one row.
struct TrunkTensor {
  std::string name;
  MatrixLayout layout;
};

class Trunk {
 public:
  // Throws DamagedFile if the file is not `bytes` long or does not match `checksum`, and Interrupted.
  Trunk(const std::string& path, uint64_t bytes, uint32_t checksum, const std::vector<TrunkTensor>& tensors,
        const Device& device, Interrupt* interrupt = nullptr);

  const std::string& path() const { return path_; }
  // The memory that a file of so many bytes is read to: a direct read needs whole blocks.
  static size_t room(uint64_t bytes) { return align_up(bytes, kSmallAlignment) + kSmallAlignment; }

  // Pointers of the device.
  Matrix matrix(const std::string& name) const;                           // throws DamagedFile if it is missing
  Matrix matrix_if_any(const std::string& name) const;                    // empty if it is missing
  const float* vector(const std::string& name, int length) const;         // float32 values, checked length
  const float* vector_if_any(const std::string& name, int length) const;  // null if it is missing

  // A tensor of one value; throws like vector().
  float number(const std::string& name) const;

  // A copy of a vector's values for the host; empty if it is missing.
  std::vector<float> host_vector(const std::string& name, int length) const;

 private:
  std::string path_;
  std::unique_ptr<DeviceMemory> memory_;
  std::unordered_map<std::string, Matrix> tensors_;
};

}  // namespace edge_moe
