// Slots, eviction and reader threads; see expert_cache.h.
#include "expert_cache.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "threads.h"

namespace edge_moe {

ExpertCache::ExpertCache(ExpertStore& store, const Device& device, size_t bytes, int readers, double half_life)
    : store_(store), half_life_(half_life) {
  const size_t records = store.records().size();
  slot_of_.assign(records, -1);
  used_at_.assign(records, 0);
  uses_.resize(records);
  for (size_t i = 0; i < records; ++i) uses_[i] = store.records()[i].frequency;
  if (store.mapped()) return;

  bytes = bytes / kSmallAlignment * kSmallAlignment;
  if (bytes < store.largest_record()) throw std::invalid_argument("the slots must hold the largest record");
  size_t all = 0;
  for (const Record& record : store.records()) all += record.padded;
  holds_all_ = bytes >= all;
  memory_ = device.memory(bytes, readers, store.largest_record(), true);
  // As many as can ever be: each record at most once, and free memory before each and at the end.
  ahead_.reserve(records);
  slots_.resize(2 * std::min(records, bytes / store.smallest_record()) + 1);
  slots_[0].bytes = bytes;
  for (int i = int(slots_.size()) - 1; i > 0; --i) unused_.push_back(i);
  start_threads(
      readers_, readers, [this](int reader) { read_requests(reader); }, [this] { stop(); });
}

ExpertCache::~ExpertCache() { stop(); }

void ExpertCache::stop() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  requested_.notify_all();
  for (std::thread& reader : readers_) reader.join();
}

ExpertCache::Acquired ExpertCache::acquire(int record) {
  std::lock_guard lock(mutex_);
  if (store_.mapped()) {
    ++stats_.hits;
    return Acquired::kHit;
  }
  const double now = score(record) + 1.0;
  Acquired result;
  if (int slot = slot_of_[record]; slot >= 0) {
    if (slots_[slot].pins++ == 0) slots_[slot].left = slots_[slot].state == State::kLoading;
    stats_.read_ahead_used += std::exchange(slots_[slot].ahead, false);
    result = slots_[slot].state == State::kReady ? Acquired::kHit : Acquired::kLoading;
    ++stats_.hits;
  } else {
    slot = make_slot(store_.records()[record].padded);
    if (slot < 0) return Acquired::kNoSlot;
    slots_[slot].record = record, slots_[slot].state = State::kLoading, slots_[slot].pins = 1,
    slots_[slot].left = false;
    slot_of_[record] = slot;
    queue_.push_back(slot);
    ++stats_.misses;
    stats_.bytes_read += store_.records()[record].padded;
    requested_.notify_one();
    result = Acquired::kLoading;
  }
  uses_[record] = now;
  used_at_[record] = clock_;
  return result;
}

void ExpertCache::read_ahead(std::span<const int32_t> records) {
  if (store_.mapped()) return;
  std::lock_guard lock(mutex_);
  ahead_.assign(records.rbegin(), records.rend());
  for (size_t i = 0; i < records.size(); ++i) requested_.notify_one();
}

bool ExpertCache::holds(int record) const {
  if (store_.mapped()) return true;
  std::lock_guard lock(mutex_);
  return slot_of_[record] >= 0;
}

const uint8_t* ExpertCache::bytes(int record) {
  if (store_.mapped()) return store_.map(record);
  std::lock_guard lock(mutex_);
  const int slot = slot_of_[record];
  if (slots_[slot].state == State::kFailed) std::rethrow_exception(slots_[slot].error);
  return slots_[slot].state == State::kReady ? memory_->data() + slots_[slot].offset : nullptr;
}

bool ExpertCache::wait(std::chrono::milliseconds most) {
  std::unique_lock lock(mutex_);
  const bool landed = landed_.wait_for(lock, most, [this] { return ended_ != seen_; });
  seen_ = ended_;
  return landed;
}

void ExpertCache::release(int record) {
  if (store_.mapped()) return;
  std::lock_guard lock(mutex_);
  Slot& slot = slots_[slot_of_[record]];
  if (--slot.pins > 0 || slot.state != State::kFailed) return;
  free_slot(slot_of_[record]);  // a failed read is tried again the next time it is wanted
}

void ExpertCache::tick() {
  std::lock_guard lock(mutex_);
  ++clock_;
}

// A record's uses, fading with the layers computed since the last one.
double ExpertCache::score(int record) const {
  return uses_[record] * std::exp2(-double(clock_ - used_at_[record]) / half_life_);
}

bool ExpertCache::evictable(const Slot& slot) const {
  return slot.state == State::kFree || (slot.state == State::kReady && slot.pins == 0);
}

// Where the neighbours begin that have so many bytes and the lowest sum of scores; -1 when too much is pinned or
// loading. Of records of one size a window is a slot or two, so each is added up anew.
int ExpertCache::cheapest(size_t bytes) const {
  int best = -1;
  double lowest = std::numeric_limits<double>::infinity();
  for (int first = 0; first >= 0 && lowest > 0; first = slots_[first].next) {
    size_t room = 0;
    double sum = 0;
    for (int slot = first; slot >= 0 && room < bytes && evictable(slots_[slot]); slot = slots_[slot].next) {
      room += slots_[slot].bytes;
      if (slots_[slot].record >= 0) sum += score(slots_[slot].record);
    }
    if (room >= bytes && sum < lowest) lowest = sum, best = first;
  }
  return best;
}

// A slot of so many bytes, for which others were evicted; -1 when too much is pinned or loading.
int ExpertCache::make_slot(size_t bytes) {
  const int first = cheapest(bytes);
  if (first < 0) return -1;
  Slot& slot = slots_[first];
  if (slot.record >= 0) slot_of_[slot.record] = -1;
  slot.record = -1, slot.state = State::kFree, slot.ahead = false;
  while (slot.bytes < bytes || joins(slot)) absorb_next(slot);
  if (slot.bytes > bytes) {
    const int rest = unused_.back();
    unused_.pop_back();
    slots_[rest].offset = slot.offset + bytes, slots_[rest].bytes = slot.bytes - bytes;
    slots_[rest].next = std::exchange(slot.next, rest);
    slot.bytes = bytes;
  }
  return first;
}

// Is it followed by free memory? Then that becomes part of it: free memory is in one piece between two slots.
bool ExpertCache::joins(const Slot& slot) const { return slot.next >= 0 && slots_[slot.next].state == State::kFree; }

void ExpertCache::absorb_next(Slot& slot) {
  const int at = slot.next;
  Slot& next = slots_[at];
  if (next.record >= 0) slot_of_[next.record] = -1;
  slot.next = next.next;
  slot.bytes += next.bytes;
  next = {};
  unused_.push_back(at);
}

void ExpertCache::free_slot(int failed) {
  slot_of_[slots_[failed].record] = -1;
  slots_[failed].record = -1, slots_[failed].state = State::kFree, slots_[failed].ahead = false;
  slots_[failed].error = nullptr;
  for (int slot = 0; slot >= 0; slot = slots_[slot].next)
    while (slots_[slot].state == State::kFree && joins(slots_[slot])) absorb_next(slots_[slot]);
}

CacheStats ExpertCache::stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

int ExpertCache::records_held() const {
  std::lock_guard lock(mutex_);
  return int(std::count_if(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.record >= 0; }));
}

// A slot to fill: one that was asked for, else one for a record to read ahead; -1 when there is nothing to do.
int ExpertCache::next_request() {
  if (!queue_.empty()) {
    const int slot = queue_.front();
    queue_.pop_front();
    return slot;
  }
  while (!ahead_.empty()) {
    const int record = ahead_.back();
    ahead_.pop_back();
    if (slot_of_[record] >= 0) continue;
    const int slot = make_slot(store_.records()[record].padded);
    if (slot < 0) continue;
    slots_[slot].record = record, slots_[slot].state = State::kLoading, slots_[slot].ahead = true;
    slots_[slot].left = false;
    slot_of_[record] = slot;
    ++stats_.read_ahead;
    stats_.bytes_read += store_.records()[record].padded;
    return slot;
  }
  return -1;
}

void ExpertCache::read_requests(int reader) {
  std::unique_lock lock(mutex_);
  for (int slot = -1;;) {
    requested_.wait(lock, [&] { return stop_ || (slot = next_request()) >= 0; });
    if (stop_) return;
    const int record = slots_[slot].record;
    const size_t offset = slots_[slot].offset, bytes = slots_[slot].bytes;
    lock.unlock();
    std::exception_ptr error;
    try {
      memory_->fill(reader, offset, bytes, [&](uint8_t* to) { store_.read(record, to); });
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error && slots_[slot].left && slots_[slot].pins > 0) {  // whoever wants it now has not tried yet
      slots_[slot].left = false;
      queue_.push_back(slot);
      continue;
    }
    slots_[slot].error = error;
    slots_[slot].state = error ? State::kFailed : State::kReady;
    if (error && slots_[slot].pins == 0) free_slot(slot);
    ++ended_;
    landed_.notify_one();
  }
}

}  // namespace edge_moe
