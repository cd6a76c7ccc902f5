// Handling of pages of a mapped file that cannot be read, because another program truncated the file or its disk fails.
// The system then sends SIGBUS to the thread that touches the page; unhandled, it ends the process.
//
// Instead, a guarded range reads as zeros from the touched page to the range's end and is marked as lost; code that
// computed with its bytes has to check is_lost() before giving out the result. Any other SIGBUS goes to the previous
// handler. The handler is installed while there are ranges, and guard_maps() puts it first again if another one was
// installed since.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge_moe {

struct GuardedRange;

// Survive faults in these mapped bytes until unguard(). `data` is page aligned.
GuardedRange* guard(uint8_t* data, size_t bytes);
void unguard(GuardedRange* range);

bool is_lost(const GuardedRange* range);
void set_found(GuardedRange* range);  // the file has been mapped again at the same address

// Make sure that the handler is the first to be called. Cheap; to be called before a use of guarded ranges.
void guard_maps();

}  // namespace edge_moe
