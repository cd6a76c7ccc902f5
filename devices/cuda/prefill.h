// Products of many tokens on tensor cores: see prefill.cu. Pointers are device pointers; a launch copies its jobs.
#pragma once

#include "decode.h"

namespace edge_moe::cuda {

// Computes jobs of widths below 16, 64 tokens at a time.
void products(const ProductJob* jobs, int count, const VectorBuffer& x, Stream stream);

}  // namespace edge_moe::cuda
