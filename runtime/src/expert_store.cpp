// Reading and mapping records; see expert_store.h.
#include "expert_store.h"

#include <algorithm>
#include <stdexcept>

#include "../../devices/checksum.h"
#include "map_guard.h"

namespace edge_moe {

ExpertStore::ExpertStore(const std::vector<std::string>& paths, std::vector<Record> records,
                         std::vector<RecordLayout> layouts, bool mapped)
    : records_(std::move(records)), layouts_(std::move(layouts)), verified_(records_.size()) {
  for (const std::string& path : paths) files_.push_back(std::make_unique<File>(path));
  for (const Record& record : records_) {
    const File& file = *files_.at(record.file);
    const size_t used = layouts_.empty() ? 0 : layouts_.at(record.layout).bytes;
    if (record.offset > file.bytes || record.padded > file.bytes - record.offset || used > record.padded ||
        record.offset % kSmallAlignment || record.padded % kSmallAlignment)
      throw DamagedFile(file.path + ": expert " + std::to_string(record.expert) + " of layer " +
                        std::to_string(record.layer) + " does not lie inside the file; copy the bundle again");
  }
  if (!mapped) return;
  for (const auto& file : files_) {
    maps_.emplace_back(*file);
    stamps_.push_back(file->settled_stamp());
  }
}

ExpertWeights ExpertStore::weights(int record, const uint8_t* bytes) const {
  const RecordLayout& layout = layouts_[records_[record].layout];
  auto matrix = [&](Projection which) { return matrix_at(layout.matrices[which], bytes); };
  return {matrix(kGate), matrix(kUp), matrix(kDown)};
}

bool ExpertStore::direct() const {
  return std::all_of(files_.begin(), files_.end(), [](const auto& file) { return file->direct; });
}

size_t ExpertStore::largest_record() const {
  size_t largest = 0;
  for (const Record& record : records_) largest = std::max<size_t>(largest, record.padded);
  return largest;
}

size_t ExpertStore::smallest_record() const {
  size_t smallest = largest_record();
  for (const Record& record : records_) smallest = std::min<size_t>(smallest, record.padded);
  return smallest;
}

void ExpertStore::read(int record, uint8_t* out) const {
  const Record& r = records_[record];
  read_exactly(*files_[r.file], r.offset, out, r.padded);
  verify(r, out);
}

const uint8_t* ExpertStore::map(int record) {
  if (!in_use_) begin_use();
  const Record& r = records_[record];
  const uint8_t* bytes = mapped_bytes(r);
  if (verified_[record]) return bytes;
  try {
    verify(r, bytes);
  } catch (...) {
    in_use_ = false;
    check_unchanged(r.file);  // a clearer error than a wrong checksum
    throw;
  }
  verified_[record] = true;
  return bytes;
}

void ExpertStore::verify_together(int first, std::span<const int> after_it, ThreadPool& pool) {
  if (!in_use_) begin_use();
  unverified_.clear();
  for (int i : after_it)
    if (!verified_[first + i]) unverified_.push_back(first + i);
  if (unverified_.empty()) return;
  pool.run(int(unverified_.size()), [&](int i, int) {
    const Record& record = records_[unverified_[i]];
    verified_[unverified_[i]] = crc32c(mapped_bytes(record), record.padded) == record.checksum;
  });
}

// A verified record stays valid as long as nobody writes to the file. Verifying each mapped record at each use would
// read memory twice, and decoding is limited by reading it once.
void ExpertStore::begin_use() {
  guard_maps();
  for (int file = 0; file < int(files_.size()); ++file) {
    if (files_[file]->stamp() == stamps_[file] && !maps_[file].lost()) continue;
    if (maps_[file].lost()) maps_[file].map_again(*files_[file]);
    for (size_t i = 0; i < records_.size(); ++i)
      if (records_[i].file == file) verified_[i] = false;
    stamps_[file] = files_[file]->settled_stamp();
  }
  in_use_ = true;
}

void ExpertStore::unmap() {
  maps_.clear();
  stamps_.clear();
  in_use_ = false;
}

void ExpertStore::end_use() {
  if (!in_use_) return;
  in_use_ = false;
  for (int file = 0; file < int(files_.size()); ++file) check_unchanged(file);
}

void ExpertStore::check_unchanged(int file) const {
  const FileStamp now = files_[file]->stamp();
  const std::string& path = files_[file]->path;
  if (now.bytes < files_[file]->bytes) throw DamagedFile(path + ": was cut short while in use; copy the bundle again");
  if (maps_[file].lost()) throw FileInUse(path + ": could not be read while in use; " + kTryAgain);
  if (now != stamps_[file]) throw FileInUse(path + ": was written to while in use; " + kTryAgain);
}

void ExpertStore::inject(ReadFault fault, int record) {
  if (record >= 0) {
    const Record& r = records_.at(record);
    fault.descriptor = files_[r.file]->descriptor;
    fault.begin = r.offset, fault.end = r.offset + r.padded;
  }
  faults_->add(fault);
  for (const auto& file : files_) file->faults.store(faults_.get(), std::memory_order_release);
}

void ExpertStore::clear_faults() { faults_->clear(); }

uint64_t ExpertStore::faults_met() const { return faults_->met(); }

void ExpertStore::verify(const Record& record, const uint8_t* bytes) const {
  if (crc32c(bytes, record.padded) != record.checksum)
    throw DamagedFile(files_[record.file]->path + ": expert " + std::to_string(record.expert) + " of layer " +
                      std::to_string(record.layer) + " does not match its checksum; copy the bundle again");
}

}  // namespace edge_moe
