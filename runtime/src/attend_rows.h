// Attention whose keys and values are the same rows for all heads: latents, or shared rows.
#pragma once

#include <algorithm>

#include "../../devices/position_sums.h"
#include "cpu_math.h"

namespace edge_moe {

// out[query], n floats each = the attention of a query to rows [0, end_of(query)), which is at most `end`. queries:
// (count, cols), at most kLatentQueries, scaled; rows(position, count): (count, cols) floats of at most kLatentRows
// consecutive rows, valid until the next call, of which the first n are values; sinks: (count,) or null.
template <typename Rows, typename End>
void CpuMath::attend_rows(const float* queries, int count, int cols, int n, int end, const End& end_of,
                          const Rows& rows, const float* sinks, float* const* out, int thread) {
  const size_t context = config_.score_positions(), first = size_t(thread) * kLatentQueries;
  float* scores = s_.scores + first * context;
  Activations x;
  x.values = queries, x.count = count, x.cols = cols;
  for (int begin = 0; begin < end; begin += kLatentRows) {
    const int some = std::min(kLatentRows, end - begin);
    const Matrix keys = float_matrix(rows(begin, some), some, cols);
    kernels_.matmul(keys, x, scores + begin, context, 0, keys.rows);
  }
  float* piece[kLatentQueries];
  int least = end;  // that a query attends to
  for (int query = 0; query < count; ++query) least = std::min(least, end_of(query));
  for (int query = 0; query < count; ++query) {
    kernels_.softmax(scores + query * context, 0, end_of(query), sinks ? sinks[query] : kNoSink);
    std::fill_n(out[query], n, 0.0f), piece[query] = s_.piece + (first + query) * n;
  }
  sum_positions(0, end, count, n, out, piece, [&](int from, int to, auto sums) {
    for (int begin = from; begin < to; begin += kLatentRows) {
      const int some = std::min(kLatentRows, to - begin);
      const KeyValues block = {nullptr, rows(begin, some), size_t(cols), false};
      const auto add = [&](int first, int queries, int last) {
        kernels_.attend_values(scores + first * context + begin, context, queries, block, 0, last - begin, n,
                               sums + first);
      };
      if (begin + some <= least) {
        add(0, count, begin + some);
        continue;
      }
      for (int query = 0; query < count; ++query)
        if (end_of(query) > begin) add(query, 1, std::min(begin + some, end_of(query)));
    }
  });
}

}  // namespace edge_moe
