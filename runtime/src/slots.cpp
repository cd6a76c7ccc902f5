// Slots and their eviction; see slots.h.
#include "slots.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace edge_moe {

Slots::Slots(size_t records, size_t smallest)
    : smallest_(std::max<size_t>(smallest, 1)), slots_(1), slot_of_(records, -1), table_(records) {
  for (std::atomic<int32_t>& slot : table_) slot.store(-1, std::memory_order_relaxed);
  by_worth_.emplace(0.0, 0);
}

void Slots::resize(size_t bytes) {
  // The maximum number: each record at most once, and free memory before each and at the end.
  const size_t most = 2 * std::min(slot_of_.size(), bytes / smallest_) + 1;
  for (size_t i = slots_.size(); i < most; ++i) unused_.push_back(int(i));
  slots_.resize(std::max(most, slots_.size()));
  if (bytes > bytes_) {
    const int end = last();
    if (slots_[end].record < 0) {
      slots_[end].bytes += bytes - bytes_;
    } else {
      const int rest = new_slot();
      slots_[rest].offset = bytes_, slots_[rest].bytes = bytes - bytes_;
      slots_[rest].previous = end, slots_[end].next = rest;
      by_worth_.emplace(0.0, rest);
    }
  }
  bytes_ = bytes;
  int end = last();
  while (slots_[end].offset + slots_[end].bytes > bytes) {
    if (slots_[end].pins) throw std::logic_error("a slot that is pinned cannot be taken away");
    vacate(end);
    if (slots_[end].offset >= bytes && end != 0) {
      const int before = slots_[end].previous;
      slots_[before].next = -1;
      erase(end);
      end = before;
    } else {
      slots_[end].bytes = bytes - slots_[end].offset;
    }
  }
  const int before = slots_[end].previous;
  if (before >= 0 && slots_[end].record < 0 && slots_[before].record < 0) absorb_next(before);
}

int Slots::place(int record, size_t bytes, double worth, bool ahead) {
  const int slot = cheapest(bytes, ahead);
  if (slot < 0) return -1;
  vacate(slot);
  while (slots_[slot].bytes < bytes || joins(slots_[slot])) absorb_next(slot);
  if (slots_[slot].bytes > bytes) split(slot, bytes);
  slots_[slot].record = record, slots_[slot].pins = 1, slots_[slot].order = ++placed_;
  slot_of_[record] = slot;
  ++held_;
  set_worth(slot, worth);
  return slot;
}

void Slots::set_worth(int slot, double worth) {
  auto node = by_worth_.extract({slots_[slot].worth, slot});
  slots_[slot].worth = worth;
  node.value() = {worth, slot};
  by_worth_.insert(std::move(node));
}

void Slots::sort(const std::vector<double>& worths) {
  by_worth_.clear();
  for (int slot = 0; slot >= 0; slot = slots_[slot].next) {
    slots_[slot].worth = slots_[slot].record >= 0 ? worths[slots_[slot].record] : 0;
    by_worth_.emplace(slots_[slot].worth, slot);
  }
}

void Slots::remove(int slot) {
  vacate(slot);
  while (joins(slots_[slot])) absorb_next(slot);
  const int previous = slots_[slot].previous;
  if (previous >= 0 && slots_[previous].record < 0) absorb_next(previous);
}

void Slots::publish(int slot) { table_[slots_[slot].record].store(slot, std::memory_order_release); }

int Slots::new_slot() {
  const int slot = unused_.back();
  unused_.pop_back();
  return slot;
}

// Turn the slot into free memory.
void Slots::vacate(int slot) {
  if (const int record = slots_[slot].record; record >= 0) {
    slot_of_[record] = -1, --held_;
    table_[record].store(-1, std::memory_order_release);
  }
  slots_[slot].record = -1, slots_[slot].pins = 0;
  set_worth(slot, 0);
}

// The first of the neighbours that together have `bytes` bytes and the lowest sum of worths; ties go to those found
// from the slot with the lowest worth, then number. -1 if too much is pinned. Slots are visited by worth: once a slot's
// worth is not below the lowest sum, neither are the sums that remain. For records of one size the neighbours are one
// or two slots, so each sum is computed anew.
int Slots::cheapest(size_t bytes, bool ahead) const {
  int best = -1;
  double lowest = std::numeric_limits<double>::infinity();
  for (const auto& [worth, slot] : by_worth_) {
    if (worth >= lowest) break;
    const auto leaves = [&](int at) { return may_leave(slots_[at], ahead); };
    if (!leaves(slot)) continue;
    size_t before = 0;  // bytes from `first` up to the slot
    for (int first = slot; first >= 0 && before < bytes && leaves(first); first = slots_[first].previous) {
      size_t room = 0;
      double sum = 0;
      for (int at = first; at >= 0 && room < bytes && leaves(at); at = slots_[at].next)
        room += slots_[at].bytes, sum += slots_[at].worth;
      if (room >= bytes && sum < lowest) lowest = sum, best = first;
      if (slots_[first].previous >= 0) before += slots_[slots_[first].previous].bytes;
    }
  }
  return best;
}

// Whether free memory follows, which is then to be merged: there is one piece of free memory between two slots.
bool Slots::joins(const Slot& slot) const { return slot.next >= 0 && slots_[slot.next].record < 0; }

void Slots::absorb_next(int slot) {
  const int at = slots_[slot].next;
  vacate(at);
  slots_[slot].next = slots_[at].next;
  if (slots_[at].next >= 0) slots_[slots_[at].next].previous = slot;
  slots_[slot].bytes += slots_[at].bytes;
  erase(at);
}

// Free the memory after the slot's first `bytes` bytes.
void Slots::split(int slot, size_t bytes) {
  const int rest = new_slot();
  slots_[rest].offset = slots_[slot].offset + bytes, slots_[rest].bytes = slots_[slot].bytes - bytes;
  slots_[rest].next = std::exchange(slots_[slot].next, rest);
  slots_[rest].previous = slot;
  if (slots_[rest].next >= 0) slots_[slots_[rest].next].previous = rest;
  slots_[slot].bytes = bytes;
  by_worth_.emplace(0.0, rest);
}

int Slots::last() const {
  int slot = 0;
  while (slots_[slot].next >= 0) slot = slots_[slot].next;
  return slot;
}

// Remove free memory that was merged into its neighbour.
void Slots::erase(int slot) {
  by_worth_.erase({slots_[slot].worth, slot});
  slots_[slot] = {};
  unused_.push_back(slot);
}

}  // namespace edge_moe
