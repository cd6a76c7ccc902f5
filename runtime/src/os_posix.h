// The parts of os.h that Linux and macOS share word for word; included once by each os_*.cpp.
#pragma once

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "os.h"

namespace edge_moe {

[[noreturn]] inline void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

inline uint64_t regular_file_bytes(const File& file) {
  struct stat info;
  if (fstat(file.descriptor, &info) != 0) fail(file.path);
  if (!S_ISREG(info.st_mode)) throw std::runtime_error(file.path + ": not a regular file");
  return uint64_t(info.st_size);
}

File::~File() {
  if (descriptor >= 0) close(descriptor);
}

Arena::Arena(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(memory);
}
Arena::~Arena() {
  if (data_) munmap(data_, bytes_);
}
Arena::Arena(Arena&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

FileMap::FileMap(const File& file) : bytes_(file.bytes) {
  if (bytes_ == 0) throw std::runtime_error(file.path + ": empty file");
  void* memory = mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, file.descriptor, 0);
  if (memory == MAP_FAILED) fail(file.path);
  data_ = static_cast<uint8_t*>(memory);
}
FileMap::~FileMap() {
  if (data_) munmap(data_, bytes_);
}
FileMap::FileMap(FileMap&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

// pread until `bytes` have come or the file ends; returns how many came.
inline size_t read_some(const File& file, uint64_t offset, uint8_t* out, size_t bytes) {
  size_t done = 0;
  while (done < bytes) {
    ssize_t got = pread(file.descriptor, out + done, bytes - done, off_t(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(file.path + ": cannot read at byte " + std::to_string(offset + done));
    if (got == 0) break;
    done += size_t(got);
  }
  return done;
}

void read_exactly(const File& file, uint64_t offset, uint8_t* out, size_t bytes) {
  const size_t done = read_some(file, offset, out, bytes);
  if (done < bytes)
    throw std::runtime_error(file.path + ": ends at byte " + std::to_string(offset + done) + ", expected at least " +
                             std::to_string(offset + bytes) + "; copy the bundle again");
}

// O_DIRECT wants an aligned buffer and length, also at the end of the file, where it returns what there is.
void read_tail(const File& file, uint64_t offset, uint8_t* out, size_t bytes) {
  if (bytes == 0) return;
  alignas(4096) static thread_local uint8_t block[4096];
  const size_t got = read_some(file, offset, block, sizeof block);
  if (got < bytes) throw std::runtime_error(file.path + ": ends early; copy the bundle again");
  std::memcpy(out, block, bytes);
}

}  // namespace edge_moe
