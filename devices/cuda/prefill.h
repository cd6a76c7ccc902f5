// Products of many tokens on tensor cores: see prefill.cu. Pointers are the device's; jobs are read before it returns.
#pragma once

#include "decode.h"

namespace edge_moe::cuda {

// Jobs of widths below 16, 64 tokens at a time.
void products(const ProductJob* jobs, int count, const VectorBuffer& x, Stream stream);

}  // namespace edge_moe::cuda
