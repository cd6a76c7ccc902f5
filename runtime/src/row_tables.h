// Tables of n-gram embeddings on storage: a step's rows are read while its first layers are computed.
//
// A row is stored by itself, as row_layout() of format.h says; its checksum is that of its number, 8 bytes, and of all
// before the checksum. A token needs a few rows of a table that may be larger than memory, so none are kept.
#pragma once

#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "../../devices/kernels.h"
#include "os.h"
#include "readers.h"

namespace edge_moe {

// Where a table is in its file.
struct TableFile {
  std::string path;
  uint64_t offset = 0, rows = 0;
  RowLayout layout;
};

class RowTables : public ReadClient {
 public:
  // values[i]: gets rows of table i as floats, (at most `most`, cols). Throws SystemError and DamagedFile.
  RowTables(const std::vector<TableFile>& files, std::vector<float*> values, size_t most, int readers,
            const Kernels& kernels);
  ~RowTables();

  // Begin to read rows of a table. The rows of the step before must have been waited for.
  void read(int table, std::span<const int64_t> rows);

  // Wait until the rows are there, as floats in the order in which they were asked for. Throws what reading them threw:
  // SystemError, or DamagedFile for a row that does not match its checksum.
  void wait(int table);

  // Wait until nothing is read any more, whatever happens.
  void finish();

  uint64_t bytes_read() const { return bytes_read_; }

  // Memory that is allocated for so many rows a step, besides the rows' values.
  static size_t bytes_for(size_t tables, size_t most, int readers);

 private:
  struct Place {
    int64_t row;
    int32_t at;  // in the table's values
  };
  struct Table {
    TableFile file;
    std::unique_ptr<File> open;
    float* values;
    std::vector<Place> places = {};  // sorted by row
    int pending = 0;                 // reads that have not ended
    std::exception_ptr error = nullptr;
  };

  std::optional<Read> read_ahead_now(int) override { return {}; }
  void fill(int reader, const Read& read) override;
  bool ended(const Read& read, std::exception_ptr error) override;

  const Kernels& kernels_;
  std::vector<Table> tables_;
  Arena blocks_;  // of each reader: the blocks of the file that a row lies in
  std::mutex mutex_;
  std::condition_variable ended_;
  std::atomic<uint64_t> bytes_read_{0};
  std::unique_ptr<Readers> readers_;  // last: its threads use the rest
};

}  // namespace edge_moe
