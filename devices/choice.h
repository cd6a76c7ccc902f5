// The positions that queries attend to, where these are not all that they see. Attention over a choice is computed as
// if the chosen positions, in ascending order, were positions 0, 1, 2...: the same bits on every device, and the bits
// of attention to all positions where all are chosen. A query is a token, or a token and one of its groups of heads.
#pragma once

#include <cstddef>

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

  // The positions that a query attends to, by number.
  struct Seen {
    const int32_t* chosen;
    EDGE_MOE_BOTH size_t operator[](int i) const { return size_t(chosen ? chosen[i] : i); }
    EDGE_MOE_BOTH bool consecutive() const { return !chosen; }
  };
  EDGE_MOE_BOTH Seen seen(int query, int) const { return {of(query)}; }
};

// What queries attend to of shared rows, numbered from 0: compressed rows, all or a choice of them, and then the rows
// of a window, both ascending. In the cache a ring of `places` rows for the window comes first.
struct RowChoice {
  Choice compressed;
  int rate;  // positions of a compressed row; 0: there are none
  int window, places;

  EDGE_MOE_BOTH int compressed_count(int query, int end) const {
    return rate ? compressed.count(query, end / rate) : 0;
  }
  EDGE_MOE_BOTH int count(int query, int end) const {
    return compressed_count(query, end) + (end < window ? end : window);
  }

  // The rows of the cache that a query which sees the first `end` positions attends to.
  struct Seen {
    const int32_t* chosen;
    int compressed, first, places;  // first: of the window
    EDGE_MOE_BOTH size_t operator[](int i) const {
      if (i >= compressed) return size_t((first + i - compressed) % places);
      return size_t(places + (chosen ? chosen[i] : i));
    }
    EDGE_MOE_BOTH bool consecutive() const { return false; }
  };
  EDGE_MOE_BOTH Seen seen(int query, int end) const {
    const int all = compressed_count(query, end);
    return {all ? compressed.of(query) : nullptr, all, end < window ? 0 : end - window, places};
  }
};

// A number that orders scores, the largest last. Both zeros have the same, and NaNs come before or after all others.
EDGE_MOE_BOTH static inline uint32_t order_key(float score) {
  score = score + 0.0f;
  uint32_t bits;
  memcpy(&bits, &score, 4);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

}  // namespace edge_moe
