// Quantising a matrix group by group: round to nearest with a searched range.
#pragma once

#include <cstdint>
#include <span>

namespace edge_moe {

struct QuantisedRows {
  uint8_t* codes;    // (rows, cols*width/8), packed as devices/format.h says
  uint16_t* scales;  // bfloat16 (rows, cols/group)
  uint16_t* biases;  // bfloat16 (rows, cols/group)
};

// weights: float32 (rows, cols); importance: (cols,) weight of each input's squared error, or null for equal weights.
// `search` off is plain round to nearest over each group's whole range. Rows are split over `threads`; the result does
// not depend on the number of threads.
void quantise_matrix(const float* weights, int rows, int cols, int width, int group, const float* importance,
                     bool search, int threads, QuantisedRows out);

}  // namespace edge_moe
