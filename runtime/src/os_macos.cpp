// os.h for macOS: F_NOCACHE, Mach task and host counters.
#include <fcntl.h>
#include <mach/mach.h>
#include <malloc/malloc.h>
#include <sys/sysctl.h>

#include <vector>

#include "os_posix.h"

namespace edge_moe {

int64_t modified_ns(const struct stat& info) {
  return int64_t(info.st_mtimespec.tv_sec) * 1'000'000'000 + info.st_mtimespec.tv_nsec;
}

int64_t changed_ns(const struct stat& info) {
  return int64_t(info.st_ctimespec.tv_sec) * 1'000'000'000 + info.st_ctimespec.tv_nsec;
}

void write_back(int descriptor) { fsync(descriptor); }

File::File(const std::string& path) : path(path) {
  descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) throw SystemError(path, errno);
  direct = fcntl(descriptor, F_NOCACHE, 1) == 0;
  bytes = regular_file_bytes(*this);
}

static task_vm_info_data_t task_memory() {
  task_vm_info_data_t info{};
  mach_msg_type_number_t count = TASK_VM_INFO_COUNT;
  task_info(mach_task_self(), TASK_VM_INFO, reinterpret_cast<task_info_t>(&info), &count);
  return info;
}

size_t resident_bytes() { return task_memory().phys_footprint; }
size_t peak_bytes() { return task_memory().ledger_phys_footprint_peak; }

bool reset_peak_bytes() { return false; }

size_t present_bytes(const uint8_t* data, size_t bytes) {
  const size_t page = size_t(getpagesize());
  std::vector<char> present((bytes + page - 1) / page);
  if (mincore(const_cast<uint8_t*>(data), bytes, present.data()) != 0) return 0;
  return page * size_t(std::count_if(present.begin(), present.end(), [](char one) { return one & MINCORE_INCORE; }));
}

int performance_cores() {
  int cores = 0;
  size_t bytes = sizeof cores;
  return sysctlbyname("hw.perflevel0.physicalcpu", &cores, &bytes, nullptr, 0) == 0 ? cores : 0;
}

size_t free_bytes() {
  vm_statistics64_data_t info{};
  mach_msg_type_number_t count = HOST_VM_INFO64_COUNT;
  host_statistics64(mach_host_self(), HOST_VM_INFO64, reinterpret_cast<host_info64_t>(&info), &count);
  return (size_t(info.free_count) + info.inactive_count + info.purgeable_count) * vm_kernel_page_size;
}

void return_freed_memory() { malloc_zone_pressure_relief(nullptr, 0); }

}  // namespace edge_moe
