// Which experts' records are in memory: asked for, counted, read, evicted. The engine is a client, and so may be any
// other that computes on what it finds in the table; Python has it as _core.Residency.
//
// It puts together who is wanted (worths.h), whose memory another gets (slots.h) and threads that read (readers.h). An
// acquired record is pinned until it is released: a slot that is read or computed on never changes hands.
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
  uint64_t read_ahead = 0, read_ahead_used = 0;  // records: read before they were asked for, and then asked for
};

class Residency final : ReadClient {
 public:
  // bytes: of all slots together, at least one largest record. With a mapped store there are none: every acquire is a
  // hit. half_life: in layers computed.
  Residency(ExpertStore& store, const Device& device, size_t bytes, int readers, double half_life);
  ~Residency();
  Residency(const Residency&) = delete;

  enum class Acquired { kHit, kMiss, kNoSlot };

  // Pin a record, starting its read if it is neither in memory nor on its way; kNoSlot when too much is pinned.
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

  // By record, the slot where it is and ready, else -1: to be read without a lock. Between begin_epoch() and
  // end_epoch() no record leaves that had a slot when it began, so what the table says then stays true.
  std::span<const std::atomic<int32_t>> table() const { return slots_.table(); }
  Slot slot(int number) const;
  void begin_epoch();
  void end_epoch();

  // Memory for so many bytes from now on; what is given up is the system's again on return. Nothing may be pinned and
  // no epoch be open. A mapped store is read into slots from now on. Throws std::invalid_argument for less than the
  // largest record, and SystemError where there is no more memory: then as much is there as before, if it can be had.
  void resize(size_t bytes);

  ResidencyStats stats() const;
  std::vector<double> worths() const;            // by record: uses, each times 2^(when / half_life)
  int records_held() const;                      // in slots now
  size_t bytes() const;                          // of all slots
  bool holds_all() const { return holds_all_; }  // has memory for every record

 private:
  enum class State { kLoading, kReady, kFailed };

  // Of a slot's record.
  struct Load {
    State state = State::kLoading;
    int wanted = 0;      // acquired so many times and not released
    bool ahead = false;  // read ahead, and not asked for yet
    bool left = false;   // its read began for a call that failed, or ahead, and not for who wants it now
    std::exception_ptr error;
  };

  std::optional<Read> read_ahead_now(int record) override;
  void fill(int reader, const Read& read) override;
  bool ended(const Read& read, std::exception_ptr error) override;
  std::optional<Read> begin(int record);
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
  uint64_t ended_ = 0, seen_ = 0;  // reads; those that wait() knows of
  int loading_ = 0;
  bool in_epoch_ = false, resizing_ = false;

  std::unique_ptr<Readers> readers_;  // the first to go: they use all of this
};

}  // namespace edge_moe
