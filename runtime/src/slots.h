// Memory divided into slots, each as large as its record, and the choice of slots to evict. No threads and no memory: a
// slot is a range of bytes.
//
// Slots are contiguous, so narrow records waste no memory beside wide ones. A new record evicts the neighbouring slots
// with the lowest sum of worths, including free memory between them; what it does not need becomes free. Slots are kept
// sorted by worth, so finding the lowest sum does not visit all of them: with 9,400 slots this made a miss 75 to 140 us
// faster. The memory can be resized at its end.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <set>
#include <span>
#include <utility>
#include <vector>

namespace edge_moe {

// A slot, or free memory between two slots. next and previous are indices of neighbours.
struct Slot {
  size_t offset = 0, bytes = 0;
  int record = -1;     // -1: free memory
  int pins = 0;        // a pinned record is not evicted
  uint64_t order = 0;  // serial number of the placement
  double worth = 0;
  int next = -1, previous = -1;
};

class Slots {
 public:
  // records: their number; smallest: bytes of the smallest one. There is no memory yet.
  Slots(size_t records, size_t smallest);

  // Set the end of the memory. Records beyond it are evicted; none of them may be pinned.
  void resize(size_t bytes);
  size_t bytes() const { return bytes_; }

  // Find a slot for a record, evicting others, and pin it once; -1 if too much is pinned. ahead: it may be needed soon,
  // and evicts none that are protected.
  int place(int record, size_t bytes, double worth, bool ahead = false);
  void pin(int slot) { ++slots_[slot].pins; }
  void unpin(int slot) { --slots_[slot].pins; }
  void set_worth(int slot, double worth);
  void sort(const std::vector<double>& worths);  // sets all worths, given by record
  void remove(int slot);                         // evicts its record
  void publish(int slot);                        // enters its record, which is ready, in the table

  // Between these two calls, no record is evicted that had a slot at the first, pinned or not: its entry in the table
  // stays valid.
  void keep() { kept_ = placed_; }
  void keep_no_longer() { kept_ = 0; }

  // Protect the `count` records from `first` on, and no others.
  void protect(int first, int count) { protected_ = first, protected_end_ = first + count; }

  const Slot& operator[](int slot) const { return slots_[slot]; }
  int count() const { return int(slots_.size()); }       // upper bound of slot numbers
  int of(int record) const { return slot_of_[record]; }  // -1: no slot
  int held() const { return held_; }                     // records that have a slot
  // The slot of each record, -1 if it is not ready.
  std::span<const std::atomic<int32_t>> table() const { return table_; }

 private:
  bool may_leave(const Slot& slot, bool ahead) const {
    if (slot.record < 0) return true;
    const bool is_protected = slot.record >= protected_ && slot.record < protected_end_;
    return slot.pins == 0 && slot.order > kept_ && !(ahead && is_protected);
  }
  int cheapest(size_t bytes, bool ahead) const;
  int new_slot();
  void assign(int slot, int record);
  void vacate(int slot);
  bool joins(const Slot& slot) const;
  void absorb_next(int slot);
  void split(int slot, size_t bytes);
  int last() const;
  void erase(int slot);

  const size_t smallest_;
  size_t bytes_ = 0;
  std::vector<Slot> slots_;                    // unordered; the list from slots_[0] by `next` is in memory order
  std::vector<int> unused_;                    // unused indices of slots_
  std::set<std::pair<double, int>> by_worth_;  // (worth, slot) of all slots in use; free memory has worth 0
  std::vector<int> slot_of_;                   // by record; -1: no slot
  std::vector<std::atomic<int32_t>> table_;
  uint64_t placed_ = 0, kept_ = 0;  // number of placements; placements up to kept_ are not evicted
  int held_ = 0, protected_ = 0, protected_end_ = 0;
};

}  // namespace edge_moe
