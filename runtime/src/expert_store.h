// Where records are on storage, and how one is brought into memory: from the memory map when the whole bundle fits
// under the cap, else by one explicit unbuffered read. Either way its checksum is verified before it is used.
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

// One expert on storage. `padded` is what is read and checksummed.
struct Record {
  int layer = 0, expert = 0;
  int file = 0;
  uint64_t offset = 0;
  uint64_t padded = 0;  // bytes
  uint32_t checksum = 0;
  float frequency = 0;  // of use during calibration, relative to its layer's others
  int layout = 0;       // where its matrices lie inside: which of the store's layouts
};

struct ExpertWeights {
  Matrix gate, up, down;
};

class ExpertStore {
 public:
  // `mapped`: records are served by map(), else by read(). Throws SystemError when a file cannot be opened and
  // DamagedFile when a record lies outside its file. layouts: none where nobody asks for weights().
  ExpertStore(const std::vector<std::string>& paths, std::vector<Record> records, std::vector<RecordLayout> layouts,
              bool mapped);

  const std::vector<Record>& records() const { return records_; }

  // A record's bytes as three matrices.
  ExpertWeights weights(int record, const uint8_t* bytes) const;
  bool mapped() const { return !maps_.empty(); }
  bool direct() const;            // every file is read past the page cache
  size_t largest_record() const;  // bytes; of no records 0
  size_t smallest_record() const;

  // Fill `out` (padded bytes, 4096-byte aligned) with a record and verify it. Thread safe.
  void read(int record, uint8_t* out) const;

  // The record in the memory map, verified on its first use and again after its file was written to. Not thread safe.
  const uint8_t* map(int record);

  // Verify those of the records first + i that map() would have to, by all threads of the pool at once. One that is
  // damaged is left for map() to name. Not thread safe.
  void verify_together(int first, std::span<const int> after_it, ThreadPool& pool);

  // Records are served by read() from now on. Nobody may use what map() gave. Not thread safe.
  void unmap();

  // To be called after the last use of bytes of map() and before its result is given out: throws when they may have
  // been others meanwhile, because a file was cut short, written to or not readable. Not thread safe.
  void end_use();

  // For tests: reads go wrong as the fault says, of one record, or of all where `record` is -1. Thread safe.
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
  std::vector<uint8_t> verified_;  // of mapped records; a byte each, as threads write them side by side
  std::vector<int> unverified_;    // of verify_together()
  std::vector<FileStamp> stamps_;  // of mapped files, when the use began
  bool in_use_ = false;            // map() has been called since the last end_use()
  std::unique_ptr<ReadFaults> faults_ = std::make_unique<ReadFaults>();
};

}  // namespace edge_moe
