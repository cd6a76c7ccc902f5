// The trunk in memory; see trunk.h.
#include "trunk.h"

#include <algorithm>
#include <stdexcept>

#include "../../devices/checksum.h"
#include "os.h"

namespace edge_moe {

Trunk::Trunk(const std::string& path, uint64_t bytes, uint32_t checksum, const std::vector<TrunkTensor>& tensors,
             const Device& device, Interrupt* interrupt)
    : path_(path) {
  const File file(path);
  if (file.bytes != bytes)
    throw DamagedFile(path + ": has " + std::to_string(file.bytes) + " bytes, expected " + std::to_string(bytes) +
                      "; copy the bundle again");
  // Only the file's bytes arrive, and the rest of the memory is unused.
  constexpr uint64_t kStep = 8 << 20;
  memory_ = device.memory(room(bytes), room(bytes), 1, kStep, false);
  const uint64_t whole = bytes / kSmallAlignment * kSmallAlignment;
  uint32_t sum = 0;
  for (uint64_t at = 0; at < bytes;) {
    const uint64_t step = at < whole ? std::min(kStep, whole - at) : bytes - at;
    memory_->fill(0, at, step, [&](uint8_t* to) {
      at < whole ? read_exactly(file, at, to, step) : read_tail(file, at, to, step);
      sum = crc32c(to, step, sum);
    });
    at += step;
    if (interrupt) interrupt->check();
  }
  memory_->filled();
  if (sum != checksum) throw DamagedFile(path + ": does not match its checksum; copy the bundle again");
  for (const TrunkTensor& t : tensors) {
    for (const Place& part : t.layout.parts)
      if (part.offset > bytes || part.bytes > bytes - part.offset)
        throw DamagedFile(path + ": tensor " + t.name + " does not lie inside the file; copy the bundle again");
    tensors_[t.name] = matrix_at(t.layout, memory_->data());
  }
}

Matrix Trunk::matrix_if_any(const std::string& name) const {
  auto found = tensors_.find(name);
  return found == tensors_.end() ? Matrix{} : found->second;
}

Matrix Trunk::matrix(const std::string& name) const {
  Matrix m = matrix_if_any(name);
  if (!m) throw DamagedFile(path_ + ": tensor " + name + " is missing; compress the model again");
  return m;
}

const float* Trunk::vector_if_any(const std::string& name, int length) const {
  Matrix m = matrix_if_any(name);
  if (!m) return nullptr;
  if (m.codec != Codec::kFloat32 || m.rows * m.cols != length)
    throw DamagedFile(path_ + ": tensor " + name + " is not " + std::to_string(length) +
                      " float32 values; compress the model again");
  return reinterpret_cast<const float*>(m.codes);
}

std::vector<float> Trunk::host_vector(const std::string& name, int length) const {
  const float* values = vector_if_any(name, length);
  std::vector<float> copy(values ? length : 0);
  if (values)
    memory_->copy_out(reinterpret_cast<const uint8_t*>(values) - memory_->data(), copy.size() * sizeof(float),
                      copy.data());
  return copy;
}

float Trunk::number(const std::string& name) const {
  matrix(name);
  return host_vector(name, 1).front();
}

const float* Trunk::vector(const std::string& name, int length) const {
  matrix(name);
  return vector_if_any(name, length);
}

}  // namespace edge_moe
