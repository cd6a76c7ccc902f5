// The slots: which records are in memory, who may be evicted, and the reader threads that fill them.
//
// Eviction is LFRU: every use adds one to a record's score and scores halve every half_life layers computed, so
// frequency decides and recency breaks it. Layers run in order, and plain LRU would evict exactly the record that is
// needed soonest. Scores outlive eviction and start from the calibration frequencies. An acquired record is pinned
// until it is released: a slot being read or computed on is never a victim. How it compares with other policies on
// recorded text, and how long a half-life is best: bench/cache_policies.py.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "expert_store.h"

namespace edge_moe {

struct CacheStats {
  uint64_t hits = 0, misses = 0, bytes_read = 0;
};

class ExpertCache {
 public:
  // With a mapped store there are no slots: every acquire is a hit. half_life: in layers computed.
  ExpertCache(ExpertStore& store, int slots, int readers, double half_life);
  ~ExpertCache();
  ExpertCache(const ExpertCache&) = delete;

  enum class Acquired { kHit, kLoading, kNoSlot };

  // Pin a record, starting its read if it is not in memory; kNoSlot when every slot is pinned.
  Acquired acquire(int record);

  // Is the record in a slot (or mapped) now? Does not pin.
  bool holds(int record) const;

  // The bytes of a pinned record, null while it loads. Throws what the read threw.
  const uint8_t* bytes(int record);

  // Wait until at least one read has ended since the last call that saw none ready.
  void wait();

  void release(int record);
  void tick() { ++clock_; }  // a layer was computed

  CacheStats stats() const { return stats_; }
  int slots() const { return int(slots_.size()); }

 private:
  enum class State { kEmpty, kLoading, kReady, kFailed };
  struct Slot {
    int record = -1;
    State state = State::kEmpty;
    int pins = 0;
    std::exception_ptr error;
  };
  double score(int record) const;
  int victim() const;
  void read_requests();
  uint8_t* slot_bytes(int slot) const { return arena_.data() + size_t(slot) * slot_size_; }

  ExpertStore& store_;
  const double half_life_;
  size_t slot_size_ = 0;
  Arena arena_;
  std::vector<Slot> slots_;
  std::vector<int> slot_of_;       // by record; -1: not in memory
  std::vector<double> uses_;       // by record: score when last used
  std::vector<uint64_t> used_at_;  // by record: clock when last used
  uint64_t clock_ = 0;
  CacheStats stats_;

  // Shared with the readers, under mutex_: slots' states, the queue, and the count of reads that ended.
  mutable std::mutex mutex_;
  std::condition_variable requested_, landed_;
  std::deque<int> queue_;  // slots to fill
  uint64_t ended_ = 0, seen_ = 0;
  bool stop_ = false;
  std::vector<std::thread> readers_;
};

}  // namespace edge_moe
