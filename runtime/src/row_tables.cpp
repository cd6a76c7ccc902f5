// Reading rows of tables; see row_tables.h.
#include "row_tables.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../../devices/checksum.h"

namespace edge_moe {

namespace {

constexpr size_t kRowBlocks = 3 * kSmallAlignment;  // a row is at most 8 KiB, and begins anywhere in a block

}  // namespace

RowTables::RowTables(const std::vector<TableFile>& files, std::vector<float*> values, size_t most, int readers,
                     const Kernels& kernels)
    : kernels_(kernels), blocks_(files.empty() ? 0 : readers * kRowBlocks) {
  for (size_t i = 0; i < files.size(); ++i) {
    const TableFile& its = files[i];
    Table table{its, std::make_unique<File>(its.path), values[i]};
    const size_t row = its.layout.bytes;
    if (row > kRowBlocks - kSmallAlignment || its.offset > table.open->bytes ||
        its.rows > (table.open->bytes - its.offset) / row)
      throw DamagedFile(its.path + ": the table does not lie inside the file; copy the bundle again");
    table.places.reserve(most);
    tables_.push_back(std::move(table));
  }
  if (!tables_.empty()) readers_ = std::make_unique<Readers>(readers, *this);
}

RowTables::~RowTables() { readers_.reset(); }

size_t RowTables::bytes_for(size_t tables, size_t most, int readers) {
  return tables ? tables * most * (sizeof(Place) + sizeof(Read)) + readers * kRowBlocks : 0;
}

void RowTables::read(int number, std::span<const int64_t> rows) {
  Table& table = tables_[number];
  table.places.clear();
  for (size_t i = 0; i < rows.size(); ++i) table.places.push_back({rows[i], int32_t(i)});
  std::sort(table.places.begin(), table.places.end(),
            [](const Place& a, const Place& b) { return std::pair(a.row, a.at) < std::pair(b.row, b.at); });
  const auto is_first = [&](size_t i) { return !i || table.places[i].row != table.places[i - 1].row; };
  int different = 0;
  for (size_t i = 0; i < rows.size(); ++i) different += is_first(i);
  {
    std::lock_guard lock(mutex_);
    table.pending = different, table.error = nullptr;
  }
  for (size_t i = 0; i < rows.size(); ++i)
    if (is_first(i)) readers_->ask({number, int(i), 0, 0});
}

// read.record: the table; read.slot: the first of its places that have the row.
void RowTables::fill(int reader, const Read& read) {
  const Table& table = tables_[read.record];
  const TableFile& its = table.file;
  const int64_t row = table.places[read.slot].row;
  const uint64_t begin = its.offset + row * its.layout.bytes, first = begin / kSmallAlignment * kSmallAlignment;
  const uint64_t whole = table.open->bytes / kSmallAlignment * kSmallAlignment;  // a direct read needs whole blocks
  const uint64_t end = align_up(begin + its.layout.bytes, kSmallAlignment),
                 middle = std::min(end, std::max(first, whole));
  uint8_t* block = blocks_.data() + reader * kRowBlocks;
  if (middle > first) read_exactly(*table.open, first, block, middle - first);
  if (end > middle) read_tail(*table.open, middle, block + (middle - first), table.open->bytes - middle);
  bytes_read_ += end - first;

  const uint8_t* bytes = block + (begin - first);
  uint32_t wanted;
  std::memcpy(&wanted, bytes + its.layout.bytes - kRowChecksum, kRowChecksum);
  if (row_checksum(bytes, its.layout.bytes, row) != wanted)
    throw DamagedFile(its.path + ": row " + std::to_string(row) +
                      " does not match its checksum; copy the bundle again");
  const Matrix matrix = matrix_at(its.layout.row, bytes);
  float* values = nullptr;
  for (size_t i = read.slot; i < table.places.size() && table.places[i].row == row; ++i) {
    float* to = table.values + size_t(table.places[i].at) * its.layout.row.cols;
    if (values)
      std::copy_n(values, its.layout.row.cols, to);
    else
      kernels_.dequantise_row(matrix, 0, to), values = to;
  }
}

bool RowTables::ended(const Read& read, std::exception_ptr error) {
  std::lock_guard lock(mutex_);
  Table& table = tables_[read.record];
  if (error) table.error = std::move(error);
  if (!--table.pending) ended_.notify_all();
  return false;
}

void RowTables::wait(int number) {
  std::unique_lock lock(mutex_);
  Table& table = tables_[number];
  ended_.wait(lock, [&] { return !table.pending; });
  if (table.error) std::rethrow_exception(std::exchange(table.error, nullptr));
}

void RowTables::finish() {
  std::unique_lock lock(mutex_);
  ended_.wait(lock, [&] {
    return std::all_of(tables_.begin(), tables_.end(), [](const Table& table) { return !table.pending; });
  });
}

}  // namespace edge_moe
