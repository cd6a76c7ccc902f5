// Sums over positions, in pieces.
//
// One running float32 sum over 131,072 positions is off by 1e-4 of its size where weights are uneven, more than half
// precision in the cache costs; a sum for every 4,096 positions, and one of these sums, by 3e-6. Pieces end at
// multiples of 4,096 in absolute positions, so that a result does not depend on how a prompt was cut.
#pragma once

#include <algorithm>

#include "lane_math.h"

namespace edge_moe {

inline constexpr int kSumPositions = 4096;

// One past the last position of the piece that one sum takes, from `from` on.
EDGE_MOE_BOTH static inline int end_of_piece(int from, int end) {
  const int to = from / kSumPositions * kSumPositions + kSumPositions;
  return to < end ? to : end;
}

// out[query] = the sum over positions [begin, end), n floats of each query. sum(from, to, rows) adds those of
// [from, to) to rows[query]; out and piece are of `queries` rows, out of zeros.
template <typename Sum>
void sum_positions(int begin, int end, int queries, int n, float* const* out, float* const* piece, Sum sum) {
  for (int from = begin; from < end;) {
    const int to = end_of_piece(from, end);
    if (from == begin) {
      sum(from, to, out);
    } else {
      for (int query = 0; query < queries; ++query) std::fill_n(piece[query], n, 0.0f);
      sum(from, to, piece);
      for (int query = 0; query < queries; ++query)
        for (int i = 0; i < n; ++i) out[query][i] += piece[query][i];
    }
    from = to;
  }
}

}  // namespace edge_moe
