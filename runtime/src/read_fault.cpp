// Injected read faults; see read_fault.h.
#include "read_fault.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

namespace edge_moe {

void ReadFaults::add(const ReadFault& fault) {
  std::lock_guard lock(mutex_);
  faults_.push_back(fault);
}

void ReadFaults::clear() {
  std::lock_guard lock(mutex_);
  faults_.clear();
  ++clears_;
  cleared_.notify_all();
}

uint64_t ReadFaults::met() const {
  std::lock_guard lock(mutex_);
  return met_;
}

ssize_t ReadFaults::pread(int descriptor, uint8_t* out, size_t bytes, uint64_t offset) {
  std::unique_lock lock(mutex_);
  size_t most = bytes;
  std::vector<uint64_t> flips;
  double bytes_per_s = 0;
  bool wrong = false, ended = false;
  int error = 0;
  for (ReadFault& fault : faults_) {
    const bool meant = fault.descriptor < 0 || fault.descriptor == descriptor;
    if (!meant || offset < fault.begin || offset >= fault.end || fault.times == 0) continue;
    if (fault.after > 0) {
      --fault.after;
      continue;
    }
    if (fault.times > 0) --fault.times;
    if (!wrong) ++met_;
    wrong = true;
    switch (fault.kind) {
      case FaultKind::kError:
        error = int(fault.value);
        break;
      case FaultKind::kEnd:
        ended = true;
        break;
      case FaultKind::kShort:
        most = std::min<size_t>(most, fault.value);
        break;
      case FaultKind::kFlip:
        flips.push_back(fault.value);
        break;
      case FaultKind::kSlow:
        bytes_per_s = double(fault.value);
        break;
    }
  }
  if (bytes_per_s > 0) {
    const std::chrono::duration<double> transfer(double(std::min(bytes, most)) / bytes_per_s);
    cleared_.wait_for(lock, transfer, [this, clears = clears_] { return clears_ != clears; });
  }
  lock.unlock();

  if (error) {
    errno = error;
    return -1;
  }
  if (ended) return 0;
  const ssize_t got = ::pread(descriptor, out, bytes, off_t(offset));
  if (got <= 0) return got;
  const size_t given = std::min(size_t(got), most);
  std::memset(out + given, 0xA5, size_t(got) - given);  // so bytes beyond a short read are not right by luck
  for (uint64_t at : flips)
    if (at < given) out[at] ^= 0x10;
  return ssize_t(given);
}

}  // namespace edge_moe
