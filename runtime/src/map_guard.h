// What happens when a page of a mapped file cannot be read: the file was cut short by another program, or its disk
// fails. The system then sends SIGBUS to whoever touches the page, which ends the process unless it is handled.
//
// A guarded range gets zero pages instead, from the one that was touched to its end, and is marked as lost; whoever
// computed with its bytes has to ask is_lost() before giving out the result. Any other SIGBUS goes to the handler that
// was there before. The handler is installed while there are ranges, and put back in front by guard_maps() where
// another has been installed since.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge_moe {

struct GuardedRange;

// From now on, until unguard(), faults in these mapped bytes are survived. `data` is page aligned.
GuardedRange* guard(uint8_t* data, size_t bytes);
void unguard(GuardedRange* range);

bool is_lost(const GuardedRange* range);
void set_found(GuardedRange* range);  // the file has been mapped there again

// Make sure that the handler is the first to be asked. Cheap; before a use of guarded ranges.
void guard_maps();

}  // namespace edge_moe
