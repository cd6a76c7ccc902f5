// The positions that queries attend to, where these are not all that they see. Attention over a choice is computed as
// if the chosen positions, in ascending order, were positions 0, 1, 2...: the same bits on every device, and the bits
// of attention to all positions where all are chosen. A query is a token, or a token and one of its groups of heads.
#pragma once

#include "lane_math.h"

namespace edge_moe {

struct Choice {
  const int32_t* positions = nullptr;  // (queries, most), ascending; null: every query attends to all that it sees
  const int32_t* counts = nullptr;     // (queries,): how many; 0: the query attends to all that it sees
  int most = 0;

  // The positions of a query; null: all that it sees.
  EDGE_MOE_BOTH const int32_t* of(int query) const {
    return positions && counts[query] ? positions + size_t(query) * most : nullptr;
  }
  // How many positions a query that sees the first `end` attends to.
  EDGE_MOE_BOTH int count(int query, int end) const { return of(query) ? counts[query] : end; }
};

// A number that orders scores, the largest last. Both zeros have the same, and NaNs come before or after all others.
EDGE_MOE_BOTH static inline uint32_t order_key(float score) {
  score = score + 0.0f;
  uint32_t bits;
  memcpy(&bits, &score, 4);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

}  // namespace edge_moe
