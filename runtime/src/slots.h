// Memory divided into slots, each as large as its record, and which of them another record may take. No threads, and
// no memory: a slot is a range of bytes.
//
// Slots lie side by side, so narrow records waste nothing beside wide ones. A record that comes takes the place of
// those neighbours that have the lowest sum of worths, free memory between them included; what is left over is free
// memory again. Slots stay sorted by worth, so the lowest sum is found without a look at all of them: with 9,400 slots
// a miss took 75 to 140 us less. The memory can be made smaller and larger at its end.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <set>
#include <span>
#include <utility>
#include <vector>

namespace edge_moe {

// A slot, or free memory between two. Neighbours are by index.
struct Slot {
  size_t offset = 0, bytes = 0;
  int record = -1;     // -1: free memory
  int pins = 0;        // while there are any, the record stays
  uint64_t order = 0;  // of all records that ever got a slot
  double worth = 0;
  int next = -1, previous = -1;
};

class Slots {
 public:
  // records: that there are; smallest: bytes of the smallest. There is no memory yet.
  Slots(size_t records, size_t smallest);

  // The memory ends at so many bytes from now on. Records beyond leave; none of them may be pinned.
  void resize(size_t bytes);
  size_t bytes() const { return bytes_; }

  // A slot for a record, pinned once, for which others leave; -1 where too much is pinned.
  int place(int record, size_t bytes, double worth);
  void pin(int slot) { ++slots_[slot].pins; }
  void unpin(int slot) { --slots_[slot].pins; }
  void set_worth(int slot, double worth);
  void sort(const std::vector<double>& worths);  // by record: all of them anew
  void remove(int slot);                         // its record leaves
  void publish(int slot);                        // its record is ready: the table has it

  // Between these two nothing leaves that was in a slot at the first, pinned or not, so that whoever reads the table
  // then finds what it says.
  void keep() { kept_ = placed_; }
  void keep_no_longer() { kept_ = 0; }

  const Slot& operator[](int slot) const { return slots_[slot]; }
  int count() const { return int(slots_.size()); }       // slots are below it
  int of(int record) const { return slot_of_[record]; }  // -1: has none
  int held() const { return held_; }                     // records that have one
  // By record: its slot once it is ready, else -1.
  std::span<const std::atomic<int32_t>> table() const { return table_; }

 private:
  bool may_leave(const Slot& slot) const { return slot.record < 0 || (slot.pins == 0 && slot.order > kept_); }
  int cheapest(size_t bytes) const;
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
  std::vector<Slot> slots_;                    // in no order; a list from slots_[0] on by `next` is in that of memory
  std::vector<int> unused_;                    // places in slots_
  std::set<std::pair<double, int>> by_worth_;  // (worth, slot) of all slots in use; of free memory 0
  std::vector<int> slot_of_;                   // by record; -1: has none
  std::vector<std::atomic<int32_t>> table_;
  uint64_t placed_ = 0, kept_ = 0;  // records that ever got a slot; those up to this one stay
  int held_ = 0;
};

}  // namespace edge_moe
