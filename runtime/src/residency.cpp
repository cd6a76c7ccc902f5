// Expert residency; see residency.h.
#include "residency.h"

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <utility>

namespace edge_moe {

static std::vector<double> frequencies(const std::vector<Record>& records) {
  std::vector<double> found;
  for (const Record& record : records) found.push_back(record.frequency);
  return found;
}

Residency::Residency(ExpertStore& store, const Device& device, size_t bytes, int readers, double half_life)
    : store_(store),
      device_(device),
      reader_count_(readers),
      worths_(frequencies(store.records()), half_life),
      slots_(store.records().size(), store.smallest_record()) {
  for (const Record& record : store.records()) all_bytes_ += record.padded;
  if (!store.mapped()) take_memory(checked(bytes));
}

Residency::~Residency() = default;

// `bytes` in whole blocks, after checking that the largest record fits.
size_t Residency::checked(size_t bytes) const {
  bytes = bytes / kSmallAlignment * kSmallAlignment;
  if (bytes < store_.largest_record()) throw std::invalid_argument("the slots must hold the largest record");
  return bytes;
}

// Allocate the memory, and start the readers if there are none.
void Residency::take_memory(size_t bytes) {
  if (!readers_) readers_ = std::make_unique<Readers>(reader_count_, static_cast<ReadClient&>(*this));
  memory_ = device_.memory(bytes, std::max(bytes, all_bytes_), reader_count_, store_.largest_record(), true);
  holds_all_ = bytes >= all_bytes_;
  end_slots(bytes);
}

void Residency::resize(size_t bytes) {
  std::unique_lock lock(mutex_);
  bytes = checked(bytes);
  if (in_epoch_) throw std::logic_error("an epoch is open; end it first");
  if (store_.mapped()) store_.unmap();
  if (!memory_) return take_memory(bytes);
  for (const Load& load : loads_)
    if (load.wanted) throw std::logic_error("a record is in use; release it first");
  resizing_ = true;  // no reads ahead meanwhile
  landed_.wait(lock, [this] { return loading_ == 0; });
  try {
    end_slots(std::min(bytes, slots_.bytes()));
    end_slots(std::min(memory_->resize(bytes), slots_.bytes()));
  } catch (...) {
    end_slots(0);
    end_slots(memory_->bytes());
    resizing_ = false;
    throw;
  }
  end_slots(bytes);
  holds_all_ = bytes >= all_bytes_;
  resizing_ = false;
}

void Residency::end_slots(size_t bytes) {
  slots_.resize(bytes);
  loads_.resize(slots_.count());
}

Residency::Acquired Residency::acquire(int record, int uses) {
  std::lock_guard lock(mutex_);
  if (store_.mapped()) {
    ++stats_.hits;
    return Acquired::kHit;
  }
  int slot = slots_.of(record);
  const bool hit = slot >= 0;
  if (hit) {
    Load& load = loads_[slot];
    ++stats_.hits;
    stats_.read_ahead_used += std::exchange(load.ahead, false);
    if (load.wanted == 0) load.left = load.state == State::kLoading;
  } else {
    if (slots_.bytes() < store_.largest_record())
      throw SystemError("there is no memory for experts", ENOMEM, "lower the cap, or load the bundle again");
    const std::optional<Read> read = begin(record, false);
    if (!read) return Acquired::kNoSlot;
    ++stats_.misses;
    slot = read->slot;
    readers_->ask(*read);
  }
  ++loads_[slot].wanted;
  slots_.pin(slot);
  worths_.use(record, uses);
  slots_.set_worth(slot, worths_.of(record));
  return hit ? Acquired::kHit : Acquired::kMiss;
}

// Place a record in a slot, which its read pins; none if too much is pinned. Does not throw.
std::optional<Read> Residency::begin(int record, bool ahead) {
  const size_t bytes = store_.records()[record].padded;
  const int slot = slots_.place(record, bytes, worths_.of(record), ahead);
  if (slot < 0) return {};
  loads_[slot] = {};
  ++loading_;
  stats_.bytes_read += bytes;
  return Read{record, slot, slots_[slot].offset, bytes};
}

void Residency::read_ahead(std::span<const int32_t> records) {
  if (readers_) readers_->ask_ahead(records);
}

void Residency::protect(int first, int count) {
  std::lock_guard lock(mutex_);
  slots_.protect(first, count);
}

std::optional<Read> Residency::read_ahead_now(int record) {
  std::lock_guard lock(mutex_);
  if (resizing_ || slots_.of(record) >= 0) return {};
  const std::optional<Read> read = begin(record, true);
  if (!read) return {};
  loads_[read->slot].ahead = true;
  ++stats_.read_ahead;
  return read;
}

void Residency::fill(int reader, const Read& read) {
  memory_->fill(reader, read.offset, read.bytes, [&](uint8_t* to) { store_.read(read.record, to); });
}

bool Residency::ended(const Read& read, std::exception_ptr error) {
  std::lock_guard lock(mutex_);
  Load& load = loads_[read.slot];
  if (error && load.left && load.wanted > 0) {  // the present acquire deserves a try of its own
    load.left = false;
    return true;
  }
  load.state = error ? State::kFailed : State::kReady;
  load.error = std::move(error);
  slots_.unpin(read.slot);
  if (load.state == State::kReady)
    slots_.publish(read.slot);
  else if (load.wanted == 0)
    slots_.remove(read.slot);
  --loading_;
  ++ended_;
  landed_.notify_all();
  return false;
}

bool Residency::holds(int record) const {
  if (store_.mapped()) return true;
  std::lock_guard lock(mutex_);
  return slots_.of(record) >= 0;
}

const uint8_t* Residency::bytes(int record) {
  if (store_.mapped()) return store_.map(record);
  std::lock_guard lock(mutex_);
  const int slot = slots_.of(record);
  if (loads_[slot].state == State::kFailed) std::rethrow_exception(loads_[slot].error);
  return loads_[slot].state == State::kReady ? memory_->data() + slots_[slot].offset : nullptr;
}

bool Residency::wait(std::chrono::milliseconds most) {
  std::unique_lock lock(mutex_);
  const bool landed = landed_.wait_for(lock, most, [this] { return ended_ != seen_; });
  seen_ = ended_;
  return landed;
}

void Residency::release(int record) {
  if (store_.mapped()) return;
  std::lock_guard lock(mutex_);
  const int slot = slots_.of(record);
  slots_.unpin(slot);
  if (--loads_[slot].wanted > 0 || loads_[slot].state != State::kFailed) return;
  loads_[slot].error = nullptr;
  slots_.remove(slot);  // the next acquire tries a failed read again
}

void Residency::tick() {
  std::lock_guard lock(mutex_);
  if (worths_.tick()) slots_.sort(worths_.all());
}

Slot Residency::slot(int number) const {
  std::lock_guard lock(mutex_);
  return slots_[number];
}

void Residency::offsets(int first, std::span<int64_t> to) const {
  std::lock_guard lock(mutex_);
  for (size_t i = 0; i < to.size(); ++i) {
    const int slot = table()[first + i].load(std::memory_order_relaxed);
    to[i] = slot < 0 ? -1 : int64_t(slots_[slot].offset);
  }
}

void Residency::begin_epoch() {
  std::lock_guard lock(mutex_);
  in_epoch_ = true;
  slots_.keep();
}

void Residency::end_epoch() {
  std::lock_guard lock(mutex_);
  in_epoch_ = false;
  slots_.keep_no_longer();
}

ResidencyStats Residency::stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

std::vector<double> Residency::worths() const {
  std::lock_guard lock(mutex_);
  return worths_.all();
}

int Residency::records_held() const {
  std::lock_guard lock(mutex_);
  return slots_.held();
}

size_t Residency::bytes() const {
  std::lock_guard lock(mutex_);
  return slots_.bytes();
}

}  // namespace edge_moe
