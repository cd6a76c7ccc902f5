// Snapshots and the buffers of recurrent states; see states.h.
#include "states.h"

#include <algorithm>
#include <stdexcept>

namespace edge_moe {

States::States(int sequences, int snapshots, int buffers) : most_(snapshots), buffers_(buffers), sequences_(sequences) {
  snapshots_.reserve(most_);
}

int States::next(int sequence) {
  if (!buffers_) return 0;
  return sequences_[sequence].next = free_buffer();
}

void States::commit(int sequence) {
  Sequence& its = sequences_[sequence];
  if (its.next >= 0) its.live = its.next;
  its.next = -1;
}

void States::abandon() {
  for (Sequence& its : sequences_) its.next = -1;
}

const States::Snapshot* States::keep(int sequence, int position) {
  const Snapshot* there = latest(sequence, position);
  if (!most_ || !position || (there && there->position == position)) return nullptr;
  if (int(snapshots_.size()) == most_) {
    const auto older = [](const Snapshot& a, const Snapshot& b) { return a.used < b.used; };
    snapshots_.erase(std::min_element(snapshots_.begin(), snapshots_.end(), older));
  }
  snapshots_.push_back({sequence, position, sequences_[sequence].live, free_slot(), ++clock_});
  return &snapshots_.back();
}

const States::Snapshot* States::latest(int sequence, int positions) const {
  const Snapshot* found = nullptr;
  for (const Snapshot& s : snapshots_)
    if (s.sequence == sequence && s.position <= positions && (!found || s.position > found->position)) found = &s;
  return found;
}

void States::restore(int sequence, const Snapshot* snapshot) {
  sequences_[sequence].live = snapshot ? snapshot->buffer : -1;
}

void States::touch(const Snapshot& snapshot) { snapshots_[&snapshot - snapshots_.data()].used = ++clock_; }

void States::drop(int sequence, int after) {
  std::erase_if(snapshots_, [&](const Snapshot& s) { return s.sequence == sequence && s.position > after; });
}

int States::replace(int sequence) {
  sequences_[sequence].live = -1;
  return sequences_[sequence].live = free_buffer();
}

int States::free_buffer() const {
  const auto is_used = [&](int buffer) {
    return std::any_of(sequences_.begin(), sequences_.end(),
                       [&](const Sequence& its) { return its.live == buffer || its.next == buffer; }) ||
           std::any_of(snapshots_.begin(), snapshots_.end(), [&](const Snapshot& s) { return s.buffer == buffer; });
  };
  for (int buffer = 0; buffer < buffers_; ++buffer)
    if (!is_used(buffer)) return buffer;
  throw std::logic_error("there is a buffer for the state after every step");
}

int States::free_slot() const {
  for (int slot = 0; slot < most_; ++slot)
    if (std::none_of(snapshots_.begin(), snapshots_.end(), [&](const Snapshot& s) { return s.slot == slot; }))
      return slot;
  throw std::logic_error("there is a slot for every snapshot");
}

}  // namespace edge_moe
