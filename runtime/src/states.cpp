// The buffers of recurrent states; see states.h.
#include "states.h"

#include <algorithm>
#include <stdexcept>

namespace edge_moe {

States::States(int sequences, int buffers) : buffers_(buffers), sequences_(sequences) {
  if (buffers && buffers < 2 * sequences) throw std::invalid_argument("every sequence needs two states");
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

void States::snapshot(int sequence, int position) {
  const int live = sequences_[sequence].live;
  if (live < 0) return;
  const auto is_there = [&](const Snapshot& s) { return s.sequence == sequence && s.position == position; };
  if (std::any_of(snapshots_.begin(), snapshots_.end(), is_there)) return;
  if (int(snapshots_.size()) >= buffers_ - 2 * int(sequences_.size())) {
    if (snapshots_.empty()) return;
    const auto older = [](const Snapshot& a, const Snapshot& b) { return a.used < b.used; };
    snapshots_.erase(std::min_element(snapshots_.begin(), snapshots_.end(), older));
  }
  snapshots_.push_back({sequence, position, live, ++clock_});
}

int States::restorable(int sequence, int positions, int position) const {
  if (!buffers_ || positions == position) return positions;
  const Snapshot* its = latest(sequence, positions);
  return its ? its->position : 0;
}

int States::buffer_of(int sequence, int positions, int position) const {
  if (positions == position) return sequences_[sequence].live;
  const Snapshot* its = latest(sequence, positions);
  if (!its) return -1;
  its->used = ++clock_;
  return its->buffer;
}

void States::restore(int sequence, int positions, int position) {
  if (!buffers_ || positions == position) return;
  sequences_[sequence].live = buffer_of(sequence, positions, position);
  drop(sequence, positions);
}

int States::replace(int sequence) {
  drop(sequence, -1);
  sequences_[sequence].live = -1;
  return sequences_[sequence].live = free_buffer();
}

int States::free_buffer() {
  for (int buffer = 0; buffer < buffers_; ++buffer)
    if (!is_used(buffer)) return buffer;
  throw std::logic_error("there is a free state for every step");
}

bool States::is_used(int buffer) const {
  return std::any_of(sequences_.begin(), sequences_.end(),
                     [&](const Sequence& its) { return its.live == buffer || its.next == buffer; }) ||
         std::any_of(snapshots_.begin(), snapshots_.end(), [&](const Snapshot& s) { return s.buffer == buffer; });
}

void States::drop(int sequence, int after) {
  std::erase_if(snapshots_, [&](const Snapshot& s) { return s.sequence == sequence && s.position > after; });
}

const States::Snapshot* States::latest(int sequence, int positions) const {
  const Snapshot* found = nullptr;
  for (const Snapshot& s : snapshots_)
    if (s.sequence == sequence && s.position <= positions && (!found || s.position > found->position)) found = &s;
  return found;
}

}  // namespace edge_moe
