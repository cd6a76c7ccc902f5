// os.h for Linux: O_DIRECT, /proc.
#include <fcntl.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstdio>
#include <cstring>

#include "os_posix.h"

namespace edge_moe {

int64_t modified_ns(const struct stat& info) {
  return int64_t(info.st_mtim.tv_sec) * 1'000'000'000 + info.st_mtim.tv_nsec;
}

int64_t changed_ns(const struct stat& info) {
  return int64_t(info.st_ctim.tv_sec) * 1'000'000'000 + info.st_ctim.tv_nsec;
}

// Without fsync's flush of the disk's own cache, which may take long. If it fails there was nothing to write.
void write_back(int descriptor) {
  sync_file_range(descriptor, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
}

File::File(const std::string& path) : path(path) {
  descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  direct = descriptor >= 0;
  if (!direct) descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);  // tmpfs and some network file systems
  if (descriptor < 0) throw SystemError(path, errno);
  bytes = regular_file_bytes(*this);
}

// The value of a line "Key:   123 kB" in a /proc file, in bytes; 0 if there is no such line.
static size_t proc_kilobytes(const char* path, const char* key) {
  FILE* file = std::fopen(path, "re");
  if (!file) return 0;
  char line[256];
  unsigned long long kilobytes = 0;
  while (std::fgets(line, sizeof line, file))
    if (std::strncmp(line, key, std::strlen(key)) == 0) {
      std::sscanf(line + std::strlen(key), " %llu", &kilobytes);
      break;
    }
  std::fclose(file);
  return size_t(kilobytes) * 1024;
}

size_t resident_bytes() { return proc_kilobytes("/proc/self/status", "VmRSS:"); }
size_t peak_bytes() { return proc_kilobytes("/proc/self/status", "VmHWM:"); }
bool reset_peak_bytes() {
  FILE* file = std::fopen("/proc/self/clear_refs", "we");
  if (!file) return false;
  const bool written = std::fputs("5", file) >= 0;  // "reset the peak resident set size", proc(5)
  return std::fclose(file) == 0 && written;
}

// Counts the present bit of pages in pagemap; file pages count only if this process has mapped them in.
size_t present_bytes(const uint8_t* data, size_t bytes) {
  constexpr uint64_t kPresent = uint64_t(1) << 63;
  const size_t page = size_t(getpagesize()), pages = (bytes + page - 1) / page;
  const int descriptor = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return 0;
  uint64_t entries[512];
  size_t present = 0;
  for (size_t at = 0; at < pages;) {
    const size_t wanted = std::min(pages - at, std::size(entries));
    const off_t offset = off_t((uintptr_t(data) / page + at) * sizeof(uint64_t));
    const ssize_t got = pread(descriptor, entries, wanted * sizeof(uint64_t), offset);
    if (got < ssize_t(sizeof(uint64_t))) break;
    const size_t count = size_t(got) / sizeof(uint64_t);
    for (size_t i = 0; i < count; ++i) present += entries[i] & kPresent ? page : 0;
    at += count;
  }
  close(descriptor);
  return present;
}

int performance_cores() { return 0; }

size_t free_bytes() { return proc_kilobytes("/proc/meminfo", "MemAvailable:"); }

void return_freed_memory() {
#ifdef __GLIBC__  // other C libraries return it by themselves
  malloc_trim(0);
#endif
}

}  // namespace edge_moe
