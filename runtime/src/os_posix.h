// The parts of os.h that are identical on Linux and macOS; included once by each os_*.cpp.
#pragma once

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

#include "../../devices/format.h"
#include "map_guard.h"
#include "os.h"
#include "read_fault.h"

namespace edge_moe {

// Each os_*.cpp has its own.
static int64_t modified_ns(const struct stat& info);
static int64_t changed_ns(const struct stat& info);
static void write_back(int descriptor);  // writes back what programs have changed in maps of the file

SystemError::SystemError(const std::string& what, int error, const std::string& advice)
    : std::runtime_error(what + ": " + std::generic_category().message(error) + (advice.empty() ? "" : "; " + advice)),
      error(error) {}

inline uint64_t regular_file_bytes(const File& file) {
  struct stat info;
  if (fstat(file.descriptor, &info) != 0) throw SystemError(file.path, errno);
  if (!S_ISREG(info.st_mode)) throw DamagedFile(file.path + ": not a regular file");
  return uint64_t(info.st_size);
}

FileStamp File::stamp() const {
  struct stat info;
  if (fstat(descriptor, &info) != 0) throw SystemError(path, errno, kTryAgain);
  return {uint64_t(info.st_size), modified_ns(info), changed_ns(info)};
}

FileStamp File::settled_stamp() const {
  using namespace std::chrono;
  constexpr int64_t kSecond = 1'000'000'000, kStep = 20'000'000;  // Linux: 10 ms at most; whole seconds: 2 s at most
  write_back(descriptor);
  const auto now_ns = [] { return duration_cast<nanoseconds>(system_clock::now().time_since_epoch()).count(); };
  FileStamp found = stamp();
  const int64_t step = found.changed_ns % kSecond ? kStep : 2 * kSecond;
  for (const int64_t begin = now_ns(); now_ns() - begin < step; found = stamp()) {
    const int64_t age = now_ns() - found.changed_ns;
    if (age < 0 || age >= step) break;  // settled, or in the future: no later write gets this time
    std::this_thread::sleep_for(milliseconds(1));
  }
  return found;
}

File::~File() {
  if (descriptor >= 0) close(descriptor);
}

// Bytes of [data, data + bytes) on pages resident in this process; each os_*.cpp has its own.
static size_t present_bytes(const uint8_t* data, size_t bytes);

// Arenas and maps of this process. Never destroyed, as some of them outlive main().
struct Places {
  std::mutex mutex;
  std::map<const uint8_t*, size_t> bytes;  // by address
};
inline Places& places() {
  static auto* all = new Places;
  return *all;
}
inline void add_place(const uint8_t* data, size_t bytes) {
  std::lock_guard lock(places().mutex);
  places().bytes[data] = bytes;
}
inline void remove_place(const uint8_t* data) {
  std::lock_guard lock(places().mutex);
  places().bytes.erase(data);
}

size_t untouched_bytes() {
  std::lock_guard lock(places().mutex);
  size_t untouched = 0;
  for (const auto& [data, bytes] : places().bytes) untouched += bytes - std::min(bytes, present_bytes(data, bytes));
  return untouched;
}

inline size_t whole_pages(size_t bytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

// Reserve addresses without memory.
inline void* reserve(void* at, size_t bytes) {
  return mmap(at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE | (at ? MAP_FIXED : 0), -1, 0);
}

Arena::Arena(size_t bytes, size_t room) : bytes_(bytes), room_(whole_pages(std::max(bytes, room))) {
  if (room_ == 0) return;
  void* memory = reserve(nullptr, room_);
  if (memory == MAP_FAILED) {  // a limit on address space: the bytes needed now may fit
    room_ = whole_pages(bytes);
    memory = reserve(nullptr, room_);
  }
  if (memory == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(memory);
  if (mprotect(data_, whole_pages(bytes), PROT_READ | PROT_WRITE) != 0) {
    munmap(data_, room_);
    throw std::bad_alloc();
  }
  add_place(data_, bytes_);
}
Arena::~Arena() {
  if (!data_) return;
  remove_place(data_);
  munmap(data_, room_);
}
Arena::Arena(Arena&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      room_(std::exchange(other.room_, 0)) {}
Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(room_, other.room_);
  return *this;
}

static constexpr const char* kLowerCap = "ask for a lower cap";

void Arena::resize(size_t bytes) {
  const size_t before = whole_pages(bytes_), now = whole_pages(bytes);
  if (now > room_) throw SystemError("more memory for experts", ENOMEM, kLowerCap);
  if (now < before && reserve(data_ + now, before - now) == MAP_FAILED) throw SystemError("give memory back", errno);
  if (now > before && mprotect(data_ + before, now - before, PROT_READ | PROT_WRITE) != 0)
    throw SystemError("more memory for experts", errno, kLowerCap);
  bytes_ = bytes;
  add_place(data_, bytes_);
}

FileMap::FileMap(const File& file) : bytes_(file.bytes) {
  if (bytes_ == 0) throw DamagedFile(file.path + ": empty file");
  void* memory = mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, file.descriptor, 0);
  if (memory == MAP_FAILED) throw SystemError(file.path, errno);
  data_ = static_cast<uint8_t*>(memory);
  guarded_ = guard(data_, bytes_);
  add_place(data_, bytes_);
}
FileMap::~FileMap() {
  if (!data_) return;
  remove_place(data_);
  unguard(guarded_);
  munmap(data_, bytes_);
}
FileMap::FileMap(FileMap&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      guarded_(std::exchange(other.guarded_, nullptr)) {}

bool FileMap::lost() const { return is_lost(guarded_); }

void FileMap::map_again(const File& file) {
  if (mmap(data_, bytes_, PROT_READ, MAP_SHARED | MAP_FIXED, file.descriptor, 0) != data_)
    throw SystemError(file.path, errno, kTryAgain);
  set_found(guarded_);
}

inline ssize_t read_once(const File& file, uint64_t offset, uint8_t* out, size_t bytes) {
  ReadFaults* faults = file.faults.load(std::memory_order_acquire);
  if (faults) return faults->pread(file.descriptor, out, bytes, offset);
  return pread(file.descriptor, out, bytes, off_t(offset));
}

// Call pread until all `bytes` are read or the file ends; returns how many were read. After a short read, a direct file
// continues at a whole block; a read of less than one block, where more is expected, is the end of the file.
inline size_t read_some(const File& file, uint64_t offset, uint8_t* out, size_t bytes) {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t result = read_once(file, offset + done, out + done, bytes - done);
    if (result < 0 && errno == EINTR) continue;
    if (result < 0)
      throw SystemError(file.path + ": cannot read at byte " + std::to_string(offset + done), errno, kTryAgain);
    const size_t got = size_t(result), blocks = got / kSmallAlignment * kSmallAlignment;
    const bool ended = got == 0 || (file.direct && blocks == 0);
    done += ended || !file.direct || done + got == bytes ? got : blocks;
    if (ended) break;
  }
  return done;
}

void read_exactly(const File& file, uint64_t offset, uint8_t* out, size_t bytes) {
  const size_t done = read_some(file, offset, out, bytes);
  if (done < bytes)
    throw DamagedFile(file.path + ": ends at byte " + std::to_string(offset + done) + ", expected at least " +
                      std::to_string(offset + bytes) + "; copy the bundle again");
}

// O_DIRECT requires an aligned buffer and length, even at the end of the file, where the read is short.
void read_tail(const File& file, uint64_t offset, uint8_t* out, size_t bytes) {
  if (bytes == 0) return;
  alignas(4096) static thread_local uint8_t block[4096];
  const size_t got = read_some(file, offset, block, sizeof block);
  if (got < bytes) throw DamagedFile(file.path + ": ends early; copy the bundle again");
  std::memcpy(out, block, bytes);
}

}  // namespace edge_moe
