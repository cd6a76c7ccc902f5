// The slots: which records are in memory, who may be evicted, and the reader threads that fill them.
//
// A slot is as large as its record: slots lie side by side in one block of memory, so narrow records waste nothing
// beside wide ones. A record that comes takes the place of those neighbours that are wanted least together, free
// memory between them included; what is left over is free memory again.
//
// Eviction is LFRU: every use adds one to a record's score and scores halve every half_life layers computed, so
// frequency decides and recency breaks it. Layers run in order, and plain LRU would evict exactly the record that is
// needed soonest. Scores outlive eviction and start from the calibration frequencies. They are kept in a unit that
// grows instead: a use adds 2^(clock / half_life) to a record's worth, and none fades. So a worth changes with uses of
// its own record alone, slots stay sorted by them, and the record that is wanted least is found without a look at all
// others: with 9,400 slots a miss took 75 to 140 us less. An acquired record is pinned until it is released: a slot
// being read or computed on is never a victim. How it compares with other policies on recorded text, and how long a
// half-life is best: bench/cache_policies.py.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "device.h"
#include "expert_store.h"

namespace edge_moe {

struct CacheStats {
  uint64_t hits = 0, misses = 0, bytes_read = 0;
  uint64_t read_ahead = 0, read_ahead_used = 0;  // records: read before they were asked for, and then asked for
};

class ExpertCache {
 public:
  // bytes: of all slots together, at least one largest record. With a mapped store there are none: every acquire is a
  // hit. half_life: in layers computed.
  ExpertCache(ExpertStore& store, const Device& device, size_t bytes, int readers, double half_life);
  ~ExpertCache();
  ExpertCache(const ExpertCache&) = delete;

  enum class Acquired { kHit, kLoading, kNoSlot };

  // Pin a record, starting its read if it is not in memory; kNoSlot when too much is pinned.
  Acquired acquire(int record, int uses = 1);  // uses: that this is, by as many tokens

  // Records that may be asked for soon, most likely first, instead of those named before. A reader with nothing else to
  // do reads one that is not in memory; it is not pinned.
  void read_ahead(std::span<const int32_t> records);

  // Is the record in a slot (or mapped) now? Does not pin.
  bool holds(int record) const;

  // The bytes of a pinned record, null while it loads. Throws what the read threw.
  const uint8_t* bytes(int record);

  // Wait until at least one read has ended since the last call that saw none ready; false where none has in so long.
  bool wait(std::chrono::milliseconds most);

  void release(int record);
  void tick();  // a layer was computed

  CacheStats stats() const;
  std::vector<double> worths() const;            // by record: uses, each times 2^(when / half_life)
  int records_held() const;                      // in slots now
  bool holds_all() const { return holds_all_; }  // has memory for every record

 private:
  enum class State { kFree, kLoading, kReady, kFailed };

  // A slot, or free memory between two. Both neighbours are by index; the first is slots_[0] for good.
  struct Slot {
    size_t offset = 0, bytes = 0;
    int record = -1;
    State state = State::kFree;
    bool ahead = false;  // read ahead, and not asked for yet
    int pins = 0, next = -1, previous = -1;
    double worth = 0;  // of its record; as in by_worth_
    std::exception_ptr error;
    bool left = false;  // its read began for a call that failed, or ahead, and not for who wants it now
  };
  bool evictable(const Slot& slot) const;
  void sort(int slot);
  void put(int slot, int record);
  void clear(int slot);
  void rebase();
  int make_slot(size_t bytes);
  int cheapest(size_t bytes) const;
  bool joins(const Slot& slot) const;
  void absorb_next(int slot);
  void free_slot(int failed);
  int next_request();
  void read_requests(int reader);
  void stop();

  ExpertStore& store_;
  const double half_life_;
  bool holds_all_ = true;
  std::unique_ptr<DeviceMemory> memory_;
  std::vector<Slot> slots_;                    // in no order; a list from slots_[0] on by `next` is in that of memory
  std::vector<int> unused_;                    // places in slots_
  std::set<std::pair<double, int>> by_worth_;  // (worth, slot) of all slots in use; of free memory 0
  std::vector<int> slot_of_;                   // by record; -1: not in memory
  std::vector<double> worth_;                  // by record: its uses, each times the unit of its time
  double clock_ = 0, unit_ = 1;                // layers computed since the last rebase(); of a use now
  int held_ = 0;                               // records in slots

  // Shared with the readers, under mutex_: slots' states, the queue, and the count of reads that ended.
  mutable std::mutex mutex_;
  std::condition_variable requested_, landed_;
  std::deque<int> queue_;       // slots to fill
  std::vector<int32_t> ahead_;  // records to read when the queue is empty, the next one last
  CacheStats stats_;
  uint64_t ended_ = 0, seen_ = 0;
  bool stop_ = false;
  std::vector<std::thread> readers_;
};

}  // namespace edge_moe
