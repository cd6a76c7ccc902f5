// Memory on an NVIDIA GPU; see cuda_memory.h.
#include "cuda_memory.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "os.h"

namespace edge_moe {

// Whether pinned memory is counted differs between drivers, so it is looked up each time.
CudaBlock::CudaBlock(CudaMemory& memory, size_t bytes, bool shared) : memory_(&memory), shared_(shared) {
  const size_t before = resident_bytes();
  try {
    data_ = static_cast<uint8_t*>(shared ? cuda::allocate_shared(bytes) : cuda::allocate(bytes));
  } catch (const cuda::NoMemory& error) {
    throw SystemError(error.what(), ENOMEM);
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
  std::swap(shared_, other.shared_);
  std::swap(uncounted_, other.uncounted_);
  return *this;
}

namespace {

// Read by the host to where the GPU finds it, or, where the system refuses to have a device's memory read to (EFAULT,
// as some drivers' mappings are no memory of the kernel's), through a buffer of each lane.
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
  void copy_out(size_t at, size_t bytes, void* to) const override { std::memcpy(to, data() + at, bytes); }

 private:
  CudaBlock block_;
  const size_t piece_;
  std::vector<Arena> buffers_;  // by lane, empty until it is needed
};

// Read by the host and copied to the GPU, each lane through a piece and a stream of its own.
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
  void copy_out(size_t at, size_t bytes, void* to) const override {
    const Stream stream;
    cuda::copy(to, data() + at, bytes, stream.stream);
    cuda::wait(stream.stream);
  }

 private:
  struct Stream {
    Stream() : stream(cuda::make_stream()) {}
    ~Stream() { cuda::release_stream(stream); }
    Stream(const Stream&) = delete;
    cuda::Stream stream;
  };
  struct Lane : Stream {
    Lane(CudaMemory& memory, size_t bytes) : piece(memory, bytes, true) {}
    CudaBlock piece;
  };
  CudaBlock block_;
  std::vector<std::unique_ptr<Lane>> lanes_;
};

}  // namespace

std::unique_ptr<DeviceMemory> CudaMemory::filled(size_t bytes, int lanes, size_t piece, bool again) {
  // What is read again and again by kernels, and filled once, is better off in memory that the GPU caches.
  if (again && properties.integrated) return std::make_unique<InPlace>(*this, bytes, lanes, piece);
  return std::make_unique<Staged>(*this, bytes, lanes, piece);
}

}  // namespace edge_moe
