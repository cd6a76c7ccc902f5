// Slots, eviction and reader threads; see expert_cache.h.
#include "expert_cache.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace edge_moe {

ExpertCache::ExpertCache(ExpertStore& store, int slots, int readers, double half_life)
    : store_(store), half_life_(half_life) {
  const size_t records = store.records().size();
  slot_of_.assign(records, -1);
  used_at_.assign(records, 0);
  uses_.resize(records);
  for (size_t i = 0; i < records; ++i) uses_[i] = store.records()[i].frequency;
  if (store.mapped()) return;

  slot_size_ = store.largest_record();
  arena_ = Arena(slot_size_ * slots);
  slots_.resize(slots);
  for (int i = 0; i < readers; ++i) readers_.emplace_back([this] { read_requests(); });
}

ExpertCache::~ExpertCache() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  requested_.notify_all();
  for (std::thread& reader : readers_) reader.join();
}

ExpertCache::Acquired ExpertCache::acquire(int record) {
  const double now = score(record) + 1.0;
  if (store_.mapped()) {
    ++stats_.hits;
    return Acquired::kHit;
  }
  std::lock_guard lock(mutex_);
  Acquired result;
  if (int slot = slot_of_[record]; slot >= 0) {
    ++slots_[slot].pins;
    result = slots_[slot].state == State::kReady ? Acquired::kHit : Acquired::kLoading;
    ++stats_.hits;
  } else {
    slot = victim();
    if (slot < 0) return Acquired::kNoSlot;
    if (slots_[slot].record >= 0) slot_of_[slots_[slot].record] = -1;
    slots_[slot] = {record, State::kLoading, 1, nullptr};
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
  return slots_[slot].state == State::kReady ? slot_bytes(slot) : nullptr;
}

void ExpertCache::wait() {
  std::unique_lock lock(mutex_);
  landed_.wait(lock, [this] { return ended_ != seen_; });
  seen_ = ended_;
}

void ExpertCache::release(int record) {
  if (store_.mapped()) return;
  std::lock_guard lock(mutex_);
  Slot& slot = slots_[slot_of_[record]];
  if (--slot.pins > 0 || slot.state != State::kFailed) return;
  slot_of_[record] = -1;  // a failed read is tried again the next time it is wanted
  slot = {};
}

// A record's uses, fading with the layers computed since the last one.
double ExpertCache::score(int record) const {
  return uses_[record] * std::exp2(-double(clock_ - used_at_[record]) / half_life_);
}

// An empty slot, else the unpinned one whose record has the lowest score; -1 when every slot is pinned or loading.
int ExpertCache::victim() const {
  int best = -1;
  double lowest = std::numeric_limits<double>::infinity();
  for (int i = 0; i < int(slots_.size()); ++i) {
    const Slot& slot = slots_[i];
    if (slot.state == State::kEmpty) return i;
    if (slot.pins > 0 || slot.state != State::kReady) continue;
    if (double value = score(slot.record); value < lowest) lowest = value, best = i;
  }
  return best;
}

void ExpertCache::read_requests() {
  std::unique_lock lock(mutex_);
  for (;;) {
    requested_.wait(lock, [this] { return stop_ || !queue_.empty(); });
    if (stop_) return;
    const int slot = queue_.front();
    queue_.pop_front();
    const int record = slots_[slot].record;
    lock.unlock();
    std::exception_ptr error;
    try {
      store_.read(record, slot_bytes(slot));
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    slots_[slot].error = error;
    slots_[slot].state = error ? State::kFailed : State::kReady;
    if (error && slots_[slot].pins == 0) {
      slot_of_[record] = -1;
      slots_[slot] = {};
    }
    ++ended_;
    landed_.notify_one();
  }
}

}  // namespace edge_moe
