// How the next reads of records go wrong: the seam through which tests make a disk fail, without a mock of anything.
//
// read_some() asks here instead of the system while faults are set, so the loop around pread, the checksums and the
// words of the errors are the real ones. Without faults a read costs one load of a null pointer more.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

namespace edge_moe {

enum class FaultKind {
  kError,  // the read fails with the errno `value`
  kEnd,    // the file seems to end here
  kShort,  // at most `value` bytes come at once
  kFlip,   // byte `value` of what came has a bit flipped
  kSlow,   // `value` bytes come a second
};

struct ReadFault {
  FaultKind kind;
  int descriptor = -1;                                             // of the file; -1: any
  uint64_t begin = 0, end = std::numeric_limits<uint64_t>::max();  // reads that start in these bytes of it
  int64_t after = 0;                                               // of those, how many go well first
  int64_t times = -1;                                              // and how many go wrong then; -1: all
  uint64_t value = 0;
};

class ReadFaults {
 public:
  void add(const ReadFault& fault);
  void clear();          // reads that are being slowed down go on at once
  uint64_t met() const;  // reads that went wrong so far

  // As ::pread, with what was added.
  ssize_t pread(int descriptor, uint8_t* out, size_t bytes, uint64_t offset);

 private:
  mutable std::mutex mutex_;
  std::condition_variable cleared_;
  std::vector<ReadFault> faults_;
  uint64_t met_ = 0, clears_ = 0;
};

}  // namespace edge_moe
