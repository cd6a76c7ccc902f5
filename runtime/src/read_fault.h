// Faults injected into reads of records: with these, tests simulate a failing disk.
//
// While faults are set, read_some() calls ReadFaults::pread instead of the system's, so the loop around pread, the
// checksums and the error messages are the real ones. Without faults, a read costs one more load of a null pointer.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

namespace edge_moe {

enum class FaultKind {
  kError,  // the read fails with errno `value`
  kEnd,    // the file seems to end where the read starts
  kShort,  // a read returns at most `value` bytes
  kFlip,   // a bit of byte `value` of the bytes read is flipped
  kSlow,   // reads are limited to `value` bytes per second
};

struct ReadFault {
  FaultKind kind;
  int descriptor = -1;                                             // of the file; -1: any
  uint64_t begin = 0, end = std::numeric_limits<uint64_t>::max();  // bytes of it where affected reads start
  int64_t after = 0;                                               // number of these reads that succeed first
  int64_t times = -1;                                              // number of reads that then fail; -1: all
  uint64_t value = 0;
};

class ReadFaults {
 public:
  void add(const ReadFault& fault);
  void clear();          // also wakes up reads that are being slowed down
  uint64_t met() const;  // number of reads affected so far

  // Like ::pread, with the faults applied.
  ssize_t pread(int descriptor, uint8_t* out, size_t bytes, uint64_t offset);

 private:
  mutable std::mutex mutex_;
  std::condition_variable cleared_;
  std::vector<ReadFault> faults_;
  uint64_t met_ = 0, clears_ = 0;
};

}  // namespace edge_moe
