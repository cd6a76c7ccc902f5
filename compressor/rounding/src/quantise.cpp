// Round to nearest, group by group; see quantise.h.
#include "quantise.h"

#include <cstring>
#include <vector>

#include "../../../runtime/src/threads.h"
#include "affine.h"

namespace edge_moe {

void quantise_matrix(const float* weights, int rows, int cols, int width, int group, const float* importance,
                     bool search, int threads, QuantisedRows out) {
  const std::vector<float> equal(importance ? 0 : cols, 1.0f);
  const float* weigh = importance ? importance : equal.data();
  const size_t row_bytes = size_t(cols) * width / 8;
  ThreadPool pool(threads);
  pool.run(rows, [&](int row, int) {
    uint8_t* packed = out.codes + row * row_bytes;
    std::memset(packed, 0, row_bytes);
    float codes[kMostGroup];
    for (int first = 0; first < cols; first += group) {
      const Affine a = fit_group(weights + size_t(row) * cols + first, weigh + first, group, width, search, codes);
      const size_t at = size_t(row) * (cols / group) + first / group;
      out.scales[at] = to_bfloat16(a.scale);
      out.biases[at] = to_bfloat16(a.bias);
      pack_codes(codes, group, width, packed, size_t(first) * width);
    }
  });
}

}  // namespace edge_moe
