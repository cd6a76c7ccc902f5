// What a sequence cannot be brought back from: its recurrent state and the keys and values of windows, which later
// tokens overwrite. A snapshot keeps both as they are at a position.
//
// A step reads one buffer of recurrent state and writes another, which counts once the step has succeeded; a snapshot
// is a buffer that is not given away meanwhile. The contents of windows are copied, to the slot of the snapshot.
#pragma once

#include <cstdint>
#include <vector>

namespace edge_moe {

class States {
 public:
  struct Snapshot {
    int sequence, position;
    int buffer;  // of recurrent state; -1: the model has none
    int slot;    // of the contents of windows
    uint64_t used;
  };

  // buffers: of recurrent state, 0 or 2 * sequences + snapshots.
  States(int sequences, int snapshots, int buffers);

  // The buffer with the recurrent state of a sequence; -1 if it is zero, as at position 0.
  int live(int sequence) const { return sequences_[sequence].live; }

  // A buffer for the state after the step that a sequence takes part in.
  int next(int sequence);
  void commit(int sequence);  // after the step: that buffer has the sequence's state
  void abandon();             // the step has failed

  // Keep the state of a sequence at its present position. Returns the snapshot, or null if it is there already, or
  // there is no room for any; the least recently used one makes room.
  const Snapshot* keep(int sequence, int position);

  // The snapshot of a sequence at most positions, of those up to `positions`; null if there is none.
  const Snapshot* latest(int sequence, int positions) const;

  // Make the state of a snapshot its sequence's, or zero with null.
  void restore(int sequence, const Snapshot* snapshot);

  // Note a use of a snapshot.
  void touch(const Snapshot& snapshot);

  // Forget the snapshots of a sequence at positions above `after`.
  void drop(int sequence, int after);

  // A buffer for a recurrent state that is copied to a sequence.
  int replace(int sequence);

 private:
  struct Sequence {
    int live = -1, next = -1;
  };

  int free_buffer() const;
  int free_slot() const;

  int most_, buffers_;
  std::vector<Sequence> sequences_;
  std::vector<Snapshot> snapshots_;
  uint64_t clock_ = 0;
};

}  // namespace edge_moe
