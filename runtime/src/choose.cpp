// Choosing the best of many scores; see choose.h.
#include "choose.h"

#include <algorithm>
#include <functional>

#include "../../devices/choice.h"

namespace edge_moe {

void choose_top(const float* scores, int count, int top, uint32_t* keys, int32_t* chosen) {
  std::transform(scores, scores + count, keys, order_key);
  std::nth_element(keys, keys + top - 1, keys + count, std::greater<>());
  const uint32_t least = keys[top - 1];
  auto ties = top - std::count_if(keys, keys + top, [&](uint32_t key) { return key > least; });
  for (int i = 0; i < count; ++i) {
    const uint32_t key = order_key(scores[i]);
    if (key > least || (key == least && ties-- > 0)) *chosen++ = i;
  }
}

}  // namespace edge_moe
