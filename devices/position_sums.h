// Sums over positions, computed in pieces for accuracy.
//
// One running float32 sum over 131,072 positions has a relative error of 1e-4 if weights are uneven, more than half
// precision in the cache causes; with one sum per 4,096 positions, and a sum of these, it is 3e-6. Pieces end at
// multiples of 4,096 in absolute positions, so that a result does not depend on how a prompt was split.
#pragma once

#include <algorithm>

#include "lane_math.h"

namespace edge_moe {

inline constexpr int kSumPositions = 4096;

// The end, exclusive, of the piece that begins at `from`.
EDGE_MOE_BOTH static inline int end_of_piece(int from, int end) {
  const int to = from / kSumPositions * kSumPositions + kSumPositions;
  return to < end ? to : end;
}

// out[query] = the sum over positions [begin, end), n floats for each query. sum(from, to, rows) adds positions
// [from, to) to rows[query]. out and piece have `queries` rows; out must be zeros.
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
