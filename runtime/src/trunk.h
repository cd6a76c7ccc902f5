// The trunk in a device's memory: trunk.safetensors read whole at load, and its tensors by name.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../../devices/kernels.h"
#include "device.h"
#include "interrupt.h"

namespace edge_moe {

// One trunk tensor: where its parts lie in the file. Vectors have one row.
struct TrunkTensor {
  std::string name;
  MatrixLayout layout;
};

class Trunk {
 public:
  // Throws DamagedFile when the file is not `bytes` long or does not match `checksum`, and Interrupted.
  Trunk(const std::string& path, uint64_t bytes, uint32_t checksum, const std::vector<TrunkTensor>& tensors,
        const Device& device, Interrupt* interrupt = nullptr);

  // Where the device finds them.
  Matrix matrix(const std::string& name) const;                           // throws DamagedFile when it is missing
  Matrix matrix_if_any(const std::string& name) const;                    // empty when it is missing
  const float* vector(const std::string& name, int length) const;         // float32 values, checked length
  const float* vector_if_any(const std::string& name, int length) const;  // null when it is missing

  // A vector's values for the host; none when it is missing.
  std::vector<float> host_vector(const std::string& name, int length) const;

 private:
  std::string path_;
  std::unique_ptr<DeviceMemory> memory_;
  std::unordered_map<std::string, Matrix> tensors_;
};

}  // namespace edge_moe
