// What the runtime asks of an operating system: unbuffered reads, anonymous memory, and how much memory is in use.
// os_linux.cpp and os_macos.cpp have the same functions; the build picks one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace edge_moe {

// A file opened for reading past the page cache; `direct` is false where the file system refused and reads are
// buffered. Throws std::system_error.
struct File {
  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  std::string path;
  int descriptor = -1;
  bool direct = false;
  uint64_t bytes = 0;
};

// Zeroed memory from the system, page aligned; pages count only once touched.
class Arena {
 public:
  Arena() = default;
  explicit Arena(size_t bytes);
  ~Arena();
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// A whole file mapped for reading.
class FileMap {
 public:
  explicit FileMap(const File& file);
  ~FileMap();
  FileMap(FileMap&& other) noexcept;
  FileMap& operator=(FileMap&&) = delete;

  const uint8_t* data() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// Fill `out` from `offset`. With `file.direct`, all three must be multiples of 4096. Throws std::system_error when
// the system reports an error and std::runtime_error when the file ends early.
void read_exactly(const File& file, uint64_t offset, uint8_t* out, size_t bytes);

// The same for the end of a file, at any offset and length (fewer than 4096 bytes).
void read_tail(const File& file, uint64_t offset, uint8_t* out, size_t bytes);

size_t resident_bytes();  // of this process now, as the system counts it
size_t peak_bytes();      // the most it ever was
size_t free_bytes();      // what the system could give to programs now

}  // namespace edge_moe
