// Which memory holds the recurrent state of each sequence. A state cannot be rewound like a KV cache, so a step reads
// one buffer and writes another, which counts once the step has succeeded; and a snapshot keeps the buffer of a
// position, to which its sequence can be brought back.
#pragma once

#include <cstdint>
#include <vector>

namespace edge_moe {

class States {
 public:
  // Memory for `buffers` states, at least 2 * sequences; those that sequences and steps do not need may be snapshots.
  // 0: a model without recurrent layers, whose sequences can be brought back to any position.
  States(int sequences, int buffers);

  // The buffer with the state of a sequence; -1 if it is zero, as at position 0.
  int live(int sequence) const { return sequences_[sequence].live; }

  // A buffer for the state after the step that a sequence takes part in.
  int next(int sequence);
  void commit(int sequence);  // after the step: that buffer has the sequence's state
  void abandon();             // the step has failed

  // Keep the state of a sequence at its present position, in place of the least recently used snapshot if there is no
  // room for more.
  void snapshot(int sequence, int position);

  // The maximum number of first positions, up to `positions`, that a sequence at `position` can be brought back to.
  int restorable(int sequence, int positions, int position) const;

  // Bring a sequence back to so many positions, which restorable() has returned. Snapshots of later ones are dropped.
  void restore(int sequence, int positions, int position);

  // The buffer with a sequence's state after so many positions, which restorable() has returned; -1: zero.
  int buffer_of(int sequence, int positions, int position) const;

  // Give a sequence a buffer for a state that is copied there, and drop its snapshots.
  int replace(int sequence);

 private:
  struct Sequence {
    int live = -1, next = -1;
  };
  struct Snapshot {
    int sequence, position, buffer;
    mutable uint64_t used;
  };

  int free_buffer();
  bool is_used(int buffer) const;
  void drop(int sequence, int after);  // the snapshots of a sequence at positions above `after`
  const Snapshot* latest(int sequence, int positions) const;

  int buffers_;
  std::vector<Sequence> sequences_;
  std::vector<Snapshot> snapshots_;
  mutable uint64_t clock_ = 0;
};

}  // namespace edge_moe
