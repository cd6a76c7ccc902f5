// Slots, eviction and reader threads; see expert_cache.h.
#include "expert_cache.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "threads.h"

namespace edge_moe {

static constexpr int kRebase = 512;  // half-lives after which worths get a new unit, far from what a double holds

ExpertCache::ExpertCache(ExpertStore& store, const Device& device, size_t bytes, int readers, double half_life)
    : store_(store), half_life_(half_life) {
  const size_t records = store.records().size();
  slot_of_.assign(records, -1);
  worth_.resize(records);
  for (size_t i = 0; i < records; ++i) worth_[i] = store.records()[i].frequency;
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
  by_worth_.emplace(0.0, 0);
  start_threads(readers_, readers, [this](int reader) { read_requests(reader); }, [this] { stop(); });
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

ExpertCache::Acquired ExpertCache::acquire(int record, int uses) {
  std::lock_guard lock(mutex_);
  if (store_.mapped()) {
    ++stats_.hits;
    return Acquired::kHit;
  }
  Acquired result;
  if (int slot = slot_of_[record]; slot >= 0) {
    if (slots_[slot].pins++ == 0) slots_[slot].left = slots_[slot].state == State::kLoading;
    stats_.read_ahead_used += std::exchange(slots_[slot].ahead, false);
    result = slots_[slot].state == State::kReady ? Acquired::kHit : Acquired::kLoading;
    ++stats_.hits;
  } else {
    slot = make_slot(store_.records()[record].padded);
    if (slot < 0) return Acquired::kNoSlot;
    put(slot, record);
    slots_[slot].pins = 1;
    queue_.push_back(slot);
    ++stats_.misses;
    stats_.bytes_read += store_.records()[record].padded;
    requested_.notify_one();
    result = Acquired::kLoading;
  }
  worth_[record] += uses * unit_;
  sort(slot_of_[record]);
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
  if (clock_ >= kRebase * half_life_) rebase();
  unit_ = std::exp2(clock_ / half_life_);
}

// Worths in a smaller unit, by a power of two that leaves their order as it is; the oldest may end as nothing.
void ExpertCache::rebase() {
  clock_ -= kRebase * half_life_;
  for (double& worth : worth_) worth = std::ldexp(worth, -kRebase);
  by_worth_.clear();
  for (int slot = 0; slot >= 0; slot = slots_[slot].next) {
    slots_[slot].worth = slots_[slot].record >= 0 ? worth_[slots_[slot].record] : 0;
    by_worth_.emplace(slots_[slot].worth, slot);
  }
}

// To where its record's worth is now.
void ExpertCache::sort(int slot) {
  const double worth = slots_[slot].record >= 0 ? worth_[slots_[slot].record] : 0;
  auto node = by_worth_.extract({slots_[slot].worth, slot});
  slots_[slot].worth = worth;
  node.value() = {worth, slot};
  by_worth_.insert(std::move(node));
}

// A record whose read begins.
void ExpertCache::put(int slot, int record) {
  slots_[slot].record = record, slots_[slot].state = State::kLoading, slots_[slot].left = false;
  slot_of_[record] = slot;
  ++held_;
  sort(slot);
}

// Free memory from now on.
void ExpertCache::clear(int slot) {
  if (slots_[slot].record >= 0) slot_of_[slots_[slot].record] = -1, --held_;
  slots_[slot].record = -1, slots_[slot].state = State::kFree, slots_[slot].ahead = false;
  sort(slot);
}

bool ExpertCache::evictable(const Slot& slot) const {
  return slot.state == State::kFree || (slot.state == State::kReady && slot.pins == 0);
}

// Where the neighbours begin that have so many bytes and the lowest sum of worths; ties go to the first in memory. -1
// when too much is pinned or loading. Slots are taken by worth: once one is worth more than the lowest sum found, so
// are all neighbours that have it or one after it. Of records of one size neighbours are a slot or two, so each sum is
// added up anew.
int ExpertCache::cheapest(size_t bytes) const {
  int best = -1;
  double lowest = std::numeric_limits<double>::infinity();
  for (const auto& [worth, slot] : by_worth_) {
    if (worth > lowest) break;
    if (!evictable(slots_[slot])) continue;
    size_t before = 0;  // bytes from `first` up to the slot
    for (int first = slot; first >= 0 && before < bytes && evictable(slots_[first]); first = slots_[first].previous) {
      size_t room = 0;
      double sum = 0;
      for (int at = first; at >= 0 && room < bytes && evictable(slots_[at]); at = slots_[at].next)
        room += slots_[at].bytes, sum += slots_[at].worth;
      const bool lower = sum < lowest || (sum == lowest && slots_[first].offset < slots_[best].offset);
      if (room >= bytes && lower) lowest = sum, best = first;
      if (slots_[first].previous >= 0) before += slots_[slots_[first].previous].bytes;
    }
  }
  return best;
}

// A slot of so many bytes, for which others were evicted; -1 when too much is pinned or loading.
int ExpertCache::make_slot(size_t bytes) {
  const int first = cheapest(bytes);
  if (first < 0) return -1;
  Slot& slot = slots_[first];
  clear(first);
  while (slot.bytes < bytes || joins(slot)) absorb_next(first);
  if (slot.bytes > bytes) {
    const int rest = unused_.back();
    unused_.pop_back();
    slots_[rest].offset = slot.offset + bytes, slots_[rest].bytes = slot.bytes - bytes;
    slots_[rest].next = std::exchange(slot.next, rest);
    slots_[rest].previous = first;
    if (slots_[rest].next >= 0) slots_[slots_[rest].next].previous = rest;
    by_worth_.emplace(0.0, rest);
    slot.bytes = bytes;
  }
  return first;
}

// Is it followed by free memory? Then that becomes part of it: free memory is in one piece between two slots.
bool ExpertCache::joins(const Slot& slot) const { return slot.next >= 0 && slots_[slot.next].state == State::kFree; }

void ExpertCache::absorb_next(int slot) {
  const int at = slots_[slot].next;
  Slot& next = slots_[at];
  if (next.record >= 0) slot_of_[next.record] = -1, --held_;
  by_worth_.erase({next.worth, at});
  slots_[slot].next = next.next;
  if (next.next >= 0) slots_[next.next].previous = slot;
  slots_[slot].bytes += next.bytes;
  next = {};
  unused_.push_back(at);
}

void ExpertCache::free_slot(int failed) {
  clear(failed);
  slots_[failed].error = nullptr;
  while (joins(slots_[failed])) absorb_next(failed);
  const int previous = slots_[failed].previous;
  if (previous >= 0 && slots_[previous].state == State::kFree) absorb_next(previous);
}

CacheStats ExpertCache::stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

std::vector<double> ExpertCache::worths() const {
  std::lock_guard lock(mutex_);
  return worth_;
}

int ExpertCache::records_held() const {
  std::lock_guard lock(mutex_);
  return held_;
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
    put(slot, record);
    slots_[slot].ahead = true;
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
