// What the runtime needs from the operating system: unbuffered reads, anonymous memory, and how much memory is in use.
// os_linux.cpp and os_macos.cpp define the same functions; the build picks one.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace edge_moe {

class ReadFaults;
struct GuardedRange;

// A system call failed: "WHAT: REASON", then "; ADVICE" if there is any. OSError in Python.
struct SystemError : std::runtime_error {
  SystemError(const std::string& what, int error, const std::string& advice = "");
  int error;  // errno
};

// A file is readable but its content is wrong: truncated, modified, of another shape. DamagedFile in Python.
struct DamagedFile : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A file was modified by another program, or unreadable, while it was in use: a retry may succeed. OSError in Python.
struct FileInUse : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Identifies a state of a file, to detect that another program has written to it. Times are nanoseconds since 1970. A
// writer can restore the modification time of the content, but not the change time of the inode, short of setting the
// system's clock.
struct FileStamp {
  uint64_t bytes = 0;
  int64_t modified_ns = 0;
  int64_t changed_ns = 0;  // of the inode: content, times, names, rights
  bool operator==(const FileStamp&) const = default;
};

// A file opened for direct I/O; `direct` is false if the file system does not support it and reads are buffered. Throws
// SystemError, and DamagedFile if it is not a regular file.
struct File {
  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  FileStamp stamp() const;  // current

  // Return a stamp that differs from the stamp after any later write. File times have a limited resolution, so it
  // waits, up to 2 s, until the last change is one step ago. Pages that another program has changed in a memory map are
  // written back first, because until then only the first change of a page is noted; on tmpfs no such change is ever
  // noted.
  FileStamp settled_stamp() const;

  std::string path;
  int descriptor = -1;
  bool direct = false;
  uint64_t bytes = 0;                        // when opened
  std::atomic<ReadFaults*> faults{nullptr};  // injected into its reads; null: none
};

// Zeroed, page-aligned memory from the system; pages count only once touched.
class Arena {
 public:
  Arena() = default;
  // room: the maximum that it may be resized to; beyond `bytes`, only addresses are reserved. Throws std::bad_alloc.
  explicit Arena(size_t bytes, size_t room = 0);
  ~Arena();
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  // Resize to `bytes`, keeping the first bytes; what is given up is returned to the system. Throws SystemError for more
  // than its room, and if the system has no more memory.
  void resize(size_t bytes);

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0, room_ = 0;
};

// A whole file mapped for reading. If a page cannot be read, because the file was truncated or its disk fails, the map
// reads as zeros from that page on and is lost.
class FileMap {
 public:
  explicit FileMap(const File& file);
  ~FileMap();
  FileMap(FileMap&& other) noexcept;
  FileMap& operator=(FileMap&&) = delete;

  const uint8_t* data() const { return data_; }
  bool lost() const;
  void map_again(const File& file);  // maps a lost file again at the same address

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  GuardedRange* guarded_ = nullptr;
};

// Advice for a file of a bundle that cannot be read now but may be later.
inline constexpr const char* kTryAgain = "try again, and copy the bundle again if that does not help";

// Fill `out` from `offset`. With `file.direct`, offset, address and length must be multiples of 4096. Throws
// SystemError if the system reports an error and DamagedFile if the file ends early.
void read_exactly(const File& file, uint64_t offset, uint8_t* out, size_t bytes);

// The same for the end of a file, at any offset, for fewer than 4096 bytes.
void read_tail(const File& file, uint64_t offset, uint8_t* out, size_t bytes);

size_t resident_bytes();     // of this process now, as the system counts them
size_t peak_bytes();         // the maximum of resident_bytes(), of all time or since reset_peak_bytes()
bool reset_peak_bytes();     // restarts the peak at the present value; false if the system cannot
size_t untouched_bytes();    // of Arenas and FileMaps of this process: resident_bytes() may still grow by them
size_t free_bytes();         // that the system could give to programs now
int performance_cores();     // of a processor that also has slower cores; 0 if all are alike or unknown
void return_freed_memory();  // gives the allocator's unused memory back to the system

}  // namespace edge_moe
