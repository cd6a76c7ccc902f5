// What the runtime asks of an operating system: unbuffered reads, anonymous memory, and how much memory is in use.
// os_linux.cpp and os_macos.cpp have the same functions; the build picks one.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace edge_moe {

class ReadFaults;
struct GuardedRange;

// What the system refused to do, and its reason: "WHAT: REASON", then "; ADVICE" where there is one. OSError in Python.
struct SystemError : std::runtime_error {
  SystemError(const std::string& what, int error, const std::string& advice = "");
  int error;  // errno
};

// A file that can be read and is not what it should be: cut short, changed, of another shape. DamagedFile in Python.
struct DamagedFile : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A file that another program changed, or that could not be read, while it was in use: the next try may be right.
// OSError in Python.
struct FileInUse : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// By what a program can tell that another one has written to a file. Times are nanoseconds since 1970. Whoever writes
// can put back the time of the last change of the content, but not that of the last change of the inode, short of
// setting the system's clock.
struct FileStamp {
  uint64_t bytes = 0;
  int64_t modified_ns = 0;
  int64_t changed_ns = 0;  // of the inode: content, times, names, rights
  bool operator==(const FileStamp&) const = default;
};

// A file opened for reading past the page cache; `direct` is false where the file system refused and reads are
// buffered. Throws SystemError, and DamagedFile for what is no regular file.
struct File {
  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  FileStamp stamp() const;  // now

  // A stamp from which that of every later write differs. Times of files go in steps, so it waits until the last
  // change is a step ago, at most 2 s. Pages that another program has mapped and changed are brought to the file
  // first, because a change of such a page is noted only once for as long as it is not: not on tmpfs, where it is
  // never noted.
  FileStamp settled_stamp() const;

  std::string path;
  int descriptor = -1;
  bool direct = false;
  uint64_t bytes = 0;                        // when it was opened
  std::atomic<ReadFaults*> faults{nullptr};  // of its reads; null: none
};

// Zeroed memory from the system, page aligned; pages count only once touched.
class Arena {
 public:
  Arena() = default;
  // room: bytes that it may be resized to, which are addresses alone until then. Throws std::bad_alloc.
  explicit Arena(size_t bytes, size_t room = 0);
  ~Arena();
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  // So many bytes from now on, the first as they were; what is given up is the system's on return. Throws SystemError
  // for more than its room, and where the system has no more.
  void resize(size_t bytes);

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0, room_ = 0;
};

// A whole file mapped for reading. Where a page cannot be read, because the file was cut short or its disk fails, there
// are zeros from that page on, and the map is lost.
class FileMap {
 public:
  explicit FileMap(const File& file);
  ~FileMap();
  FileMap(FileMap&& other) noexcept;
  FileMap& operator=(FileMap&&) = delete;

  const uint8_t* data() const { return data_; }
  bool lost() const;
  void map_again(const File& file);  // a lost one, at the same place

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  GuardedRange* guarded_ = nullptr;
};

// What to do about a file of a bundle that cannot be read now but may be later.
inline constexpr const char* kTryAgain = "try again, and copy the bundle again if that does not help";

// Fill `out` from `offset`. With `file.direct`, all three must be multiples of 4096. Throws SystemError when the system
// reports an error and DamagedFile when the file ends early.
void read_exactly(const File& file, uint64_t offset, uint8_t* out, size_t bytes);

// The same for the end of a file, at any offset and length (fewer than 4096 bytes).
void read_tail(const File& file, uint64_t offset, uint8_t* out, size_t bytes);

size_t resident_bytes();   // of this process now, as the system counts it
size_t peak_bytes();       // the most it ever was, or was since reset_peak_bytes()
bool reset_peak_bytes();   // counts the peak from what there is now on; false where the system cannot
size_t untouched_bytes();  // of all Arenas and FileMaps of this process, which resident_bytes() may still grow by
size_t free_bytes();       // what the system could give to programs now
int performance_cores();   // of a processor that has slower ones too; 0 where all are alike or the system does not tell
void return_freed_memory();  // give the system what this process has freed and its allocator keeps

}  // namespace edge_moe
