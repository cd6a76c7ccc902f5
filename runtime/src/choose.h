// Choosing the best of many scores on the processor, for any kind of sparse attention.
#pragma once

#include <cstdint>

namespace edge_moe {

// Write the indices of the `top` highest of `count` scores to `chosen`, in ascending order; ties go to the lower index.
// top: less than count. keys: a buffer of `count` numbers.
void choose_top(const float* scores, int count, int top, uint32_t* keys, int32_t* chosen);

}  // namespace edge_moe
