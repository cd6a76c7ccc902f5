// Memory on an NVIDIA GPU; see cuda_memory.h.
#include "cuda_memory.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>
#include <vector>

#include "../../devices/cuda/decode.h"
#include "os.h"

namespace edge_moe {

// Drivers differ in whether the system counts pinned memory, so it is measured each time.
CudaBlock::CudaBlock(CudaMemory& memory, size_t bytes, bool shared) : memory_(&memory), bytes_(bytes), shared_(shared) {
  const size_t before = resident_bytes();
  try {
    data_ = static_cast<uint8_t*>(shared ? cuda::allocate_shared(bytes) : cuda::allocate(bytes));
  } catch (const cuda::NoMemory& error) {
    throw SystemError(error.what(), ENOMEM, "lower the cap or the context");
  }
  const size_t now = resident_bytes(), counted = now > before ? now - before : 0;
  uncounted_ = bytes - std::min(bytes, counted);
  memory.uncounted += uncounted_;
}

CudaBlock::~CudaBlock() {
  if (!memory_) return;
  shared_ ? cuda::release_shared(data_) : cuda::release(data_);
  memory_->uncounted -= uncounted_;
}

CudaBlock::CudaBlock(CudaBlock&& other) noexcept { *this = std::move(other); }

CudaBlock& CudaBlock::operator=(CudaBlock&& other) noexcept {
  std::swap(memory_, other.memory_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(shared_, other.shared_);
  std::swap(uncounted_, other.uncounted_);
  return *this;
}

void CudaBlock::replace(size_t bytes) {
  CudaMemory& memory = *memory_;
  const size_t before = bytes_;
  const bool shared = shared_;
  *this = CudaBlock();
  try {
    *this = CudaBlock(memory, bytes, shared);
  } catch (const SystemError&) {
    *this = CudaBlock(memory, before, shared);
    throw;
  }
}

namespace {

// Read by the host straight to where the GPU uses it; or through a buffer per lane if the system refuses to read
// into a device's memory (EFAULT: mappings of some drivers are not the kernel's memory).
class InPlace : public DeviceMemory {
 public:
  InPlace(CudaMemory& memory, size_t bytes, int lanes, size_t piece)
      : block_(memory, bytes, true), piece_(piece), buffers_(lanes) {}
  uint8_t* data() const override { return block_.data(); }
  void fill(int lane, size_t at, size_t bytes, const std::function<void(uint8_t*)>& read) override {
    Arena& buffer = buffers_[lane];
    if (!buffer.data()) {
      try {
        return read(data() + at);
      } catch (const SystemError& refused) {
        if (refused.error != EFAULT) throw;
      }
      buffer = Arena(piece_);
    }
    read(buffer.data());
    std::memcpy(data() + at, buffer.data(), bytes);
  }
  size_t resize(size_t bytes) override { return block_.replace(bytes), 0; }
  size_t bytes() const override { return block_.bytes(); }
  void copy_out(size_t at, size_t bytes, void* to) const override { std::memcpy(to, data() + at, bytes); }

 private:
  CudaBlock block_;
  const size_t piece_;
  std::vector<Arena> buffers_;  // by lane, empty until needed
};

// Read by the host and copied to the GPU; each lane has its own buffer and stream.
class Staged : public DeviceMemory {
 public:
  Staged(CudaMemory& memory, size_t bytes, int lanes, size_t piece) : block_(memory, bytes, false) {
    for (int lane = 0; lane < lanes; ++lane) lanes_.push_back(std::make_unique<Lane>(memory, piece));
  }
  uint8_t* data() const override { return block_.data(); }
  void fill(int lane, size_t at, size_t bytes, const std::function<void(uint8_t*)>& read) override {
    Lane& by = *lanes_[lane];
    read(by.piece.data());
    cuda::copy(data() + at, by.piece.data(), bytes, by.stream);
    cuda::wait(by.stream);
  }
  void filled() override { lanes_.clear(); }
  size_t resize(size_t bytes) override { return block_.replace(bytes), 0; }
  size_t bytes() const override { return block_.bytes(); }
  void copy_out(size_t at, size_t bytes, void* to) const override {
    const CudaStream stream;
    cuda::copy(to, data() + at, bytes, stream);
    cuda::wait(stream);
  }

 private:
  struct Lane {
    Lane(CudaMemory& memory, size_t bytes) : piece(memory, bytes, true) {}
    CudaBlock piece;
    CudaStream stream;
  };
  CudaBlock block_;
  std::vector<std::unique_ptr<Lane>> lanes_;
};

constexpr double kAsFast = 0.9;  // minimum relative speed of shared memory, which saves a copy of each record

// The minimum time of several runs of multiplying one vector by a 4-bit matrix of 9 MB, in either kind of memory.
double product_seconds(CudaMemory& memory, bool shared) {
  constexpr int kRows = 8192, kCols = 2048, kGroup = 64, kLaunches = 8, kRounds = 5;
  constexpr size_t kCodes = size_t(kRows) * kCols / 2, kScales = size_t(kRows) * (kCols / kGroup) * 2;
  const CudaBlock weights(memory, kCodes + 2 * kScales, shared), vector(memory, 4 * kCols * sizeof(float), false),
      out(memory, kRows * sizeof(float), false);
  Matrix m;
  m.codes = weights.data();
  m.scales = reinterpret_cast<const uint16_t*>(weights.data() + kCodes);
  m.biases = m.scales + kScales / 2;
  m.rows = kRows, m.cols = kCols, m.width = 4, m.group = kGroup;
  int8_t* codes = reinterpret_cast<int8_t*>(vector.data());
  float* floats = reinterpret_cast<float*>(vector.data() + 4 * kCols);
  const cuda::VectorBuffer x = {
      codes, codes + kCols, vector.data() + 2 * kCols, floats, {floats + kCols / kBlock, floats + 3 * kCols / kBlock},
      kCols};
  const cuda::ProductJob job = cuda::whole(m, 1, reinterpret_cast<float*>(out.data()));
  const CudaStream stream;
  const std::vector<uint8_t> one_plane(kCols / kBlock);
  cuda::copy(x.two_planes, one_plane.data(), one_plane.size(), stream);
  cuda::wait(stream);
  double least = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    const auto began = std::chrono::steady_clock::now();
    for (int i = 0; i < kLaunches; ++i) cuda::product(&job, 1, x, stream);
    cuda::wait(stream);
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  return least;
}

}  // namespace

CudaMemory::CudaMemory() : properties(cuda::open()) {
  // Even on a GPU that shares the processor's memory, memory that both access may not be cached.
  in_place = properties.integrated && (std::strcmp(cuda::build(), "simulated") == 0 ||
                                       product_seconds(*this, true) * kAsFast <= product_seconds(*this, false));
}

std::unique_ptr<DeviceMemory> CudaMemory::filled(size_t bytes, int lanes, size_t piece, bool again) {
  // Memory that is filled once should be the GPU's own.
  if (again && in_place) return std::make_unique<InPlace>(*this, bytes, lanes, piece);
  return std::make_unique<Staged>(*this, bytes, lanes, piece);
}

}  // namespace edge_moe
