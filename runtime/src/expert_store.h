// Where records are on storage, and how they are brought into memory: through a memory map if the whole bundle fits
// under the cap, else by one unbuffered read per record. Either way a record's checksum is verified before its use.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "../../devices/format.h"
#include "../../devices/kernels.h"
#include "os.h"
#include "read_fault.h"
#include "threads.h"

namespace edge_moe {

// One expert on storage. Reads and checksums cover `padded` bytes.
struct Record {
  int layer = 0, expert = 0;
  int file = 0;
  uint64_t offset = 0;
  uint64_t padded = 0;  // bytes
  uint32_t checksum = 0;
  float frequency = 0;  // of use during calibration, relative to the other experts of its layer
  int layout = 0;       // index of its layout, which says where its matrices lie
};

struct ExpertWeights {
  Matrix gate, up, down;
};

class ExpertStore {
 public:
  // `mapped`: records are served by map(), else by read(). layouts: may be empty if weights() is not called. Throws
  // SystemError if a file cannot be opened and DamagedFile if a record lies outside its file.
  ExpertStore(const std::vector<std::string>& paths, std::vector<Record> records, std::vector<RecordLayout> layouts,
              bool mapped);

  const std::vector<Record>& records() const { return records_; }

  // A record's bytes as three matrices.
  ExpertWeights weights(int record, const uint8_t* bytes) const;
  bool mapped() const { return !maps_.empty(); }
  bool direct() const;            // every file is read past the page cache
  size_t largest_record() const;  // bytes; 0 without records
  size_t smallest_record() const;

  // Fill `out` (padded bytes, 4096-byte aligned) with a record and verify it. Thread safe.
  void read(int record, uint8_t* out) const;

  // The record in the memory map, verified on its first use and again after its file was modified. Not thread safe.
  const uint8_t* map(int record);

  // Verify the records first + i that map() would have to verify, on all threads of the pool. A damaged record is left
  // for map() to report. Not thread safe.
  void verify_together(int first, std::span<const int> after_it, ThreadPool& pool);

  // Serve records by read() from now on. Pointers from map() become invalid. Not thread safe.
  void unmap();

  // To be called after the last use of bytes from map(), before the result is given out: throws if the bytes may have
  // changed meanwhile, because a file was truncated, modified or unreadable. Not thread safe.
  void end_use();

  // For tests: apply the fault to reads of one record, or of all records if `record` is -1. Thread safe.
  void inject(ReadFault fault, int record);
  void clear_faults();
  uint64_t faults_met() const;

 private:
  void begin_use();
  void check_unchanged(int file) const;
  const uint8_t* mapped_bytes(const Record& record) const { return maps_[record.file].data() + record.offset; }
  void verify(const Record& record, const uint8_t* bytes) const;

  std::vector<std::unique_ptr<File>> files_;
  std::vector<FileMap> maps_;
  std::vector<Record> records_;
  std::vector<RecordLayout> layouts_;
  std::vector<uint8_t> verified_;  // of mapped records; a byte each, since several threads write at once
  std::vector<int> unverified_;    // of verify_together()
  std::vector<FileStamp> stamps_;  // of mapped files, at the first map() since the last end_use()
  bool in_use_ = false;            // whether map() has been called since the last end_use()
  std::unique_ptr<ReadFaults> faults_ = std::make_unique<ReadFaults>();
};

}  // namespace edge_moe
