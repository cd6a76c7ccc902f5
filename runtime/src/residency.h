// Expert residency: acquiring, counting, reading and evicting records. The engine is one client; others may compute on
// the records that they find in the table. In Python it is _core.Residency.
//
// It combines eviction by worth (worths.h), memory in slots (slots.h) and reader threads (readers.h). An acquired
// record is pinned until it is released: a slot that is being read or computed on is never reused.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "device.h"
#include "expert_store.h"
#include "readers.h"
#include "slots.h"
#include "worths.h"

namespace edge_moe {

struct ResidencyStats {
  uint64_t hits = 0, misses = 0, bytes_read = 0;
  uint64_t read_ahead = 0, read_ahead_used = 0;  // records read ahead; of these, acquired later
};

class Residency final : ReadClient {
 public:
  // bytes: size of all slots together, at least the largest record. A mapped store has no slots: each acquire is a hit.
  // half_life: in layers computed.
  Residency(ExpertStore& store, const Device& device, size_t bytes, int readers, double half_life);
  ~Residency();
  Residency(const Residency&) = delete;

  enum class Acquired { kHit, kMiss, kNoSlot };

  // Pin a record, starting its read if it is not in a slot; kNoSlot if too much is pinned.
  Acquired acquire(int record, int uses = 1);  // uses: the number of tokens that use it

  // Replace the list of records that may be needed soon, most likely first. Idle readers read those that are not in
  // memory, without pinning them.
  void read_ahead(std::span<const int32_t> records);

  // Let no read ahead evict the `count` records from `first` on: work that is queued may use them.
  void protect(int first, int count);

  // Whether the record is mapped or has a slot, loaded or not. Does not pin.
  bool holds(int record) const;

  // The bytes of a pinned record; null while it is being read. Throws what the read threw.
  const uint8_t* bytes(int record);

  // Wait until a read has ended since the last call of wait(); false if none does within `most`.
  bool wait(std::chrono::milliseconds most);

  void release(int record);
  void tick();  // a layer was computed

  // The slot of each record, -1 if it is not ready; readable without a lock. Between begin_epoch() and end_epoch() no
  // record is evicted that had a slot at the beginning, so its entry stays valid.
  std::span<const std::atomic<int32_t>> table() const { return slots_.table(); }
  Slot slot(int number) const;
  // Where the records from `first` on are in memory: their offsets, -1 for one that is not ready.
  void offsets(int first, std::span<int64_t> to) const;
  void begin_epoch();
  void end_epoch();

  // Resize the slots to `bytes`; what is given up is returned to the system. Nothing may be pinned and no epoch open. A
  // mapped store is read into slots from now on. Throws std::invalid_argument for less than the largest record, and
  // SystemError if the system has no more memory: the old size is then restored if possible.
  void resize(size_t bytes);

  ResidencyStats stats() const;
  std::vector<double> worths() const;            // by record: sum of uses, each times 2^(clock / half_life)
  int records_held() const;                      // in slots now
  size_t bytes() const;                          // of all slots
  bool holds_all() const { return holds_all_; }  // there is memory for every record

 private:
  enum class State { kLoading, kReady, kFailed };

  // The state of a slot's record.
  struct Load {
    State state = State::kLoading;
    int wanted = 0;      // number of acquires not yet released
    bool ahead = false;  // read ahead, and not acquired yet
    bool left = false;   // its read was started ahead or for a failed call, not for the present acquire
    std::exception_ptr error;
  };

  std::optional<Read> read_ahead_now(int record) override;
  void fill(int reader, const Read& read) override;
  bool ended(const Read& read, std::exception_ptr error) override;
  std::optional<Read> begin(int record, bool ahead);
  size_t checked(size_t bytes) const;
  void take_memory(size_t bytes);
  void end_slots(size_t bytes);

  ExpertStore& store_;
  const Device& device_;
  const int reader_count_;
  size_t all_bytes_ = 0;  // of all records
  bool holds_all_ = true;

  // Shared with the readers, under mutex_.
  mutable std::mutex mutex_;
  std::condition_variable landed_;
  Worths worths_;
  Slots slots_;
  std::vector<Load> loads_;  // by slot
  std::unique_ptr<DeviceMemory> memory_;
  ResidencyStats stats_;
  uint64_t ended_ = 0, seen_ = 0;  // reads ended; of these, reported by wait()
  int loading_ = 0;
  bool in_epoch_ = false, resizing_ = false;

  std::unique_ptr<Readers> readers_;  // destroyed first: the threads use all of the above
};

}  // namespace edge_moe
