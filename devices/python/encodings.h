// How matrices are encoded, across the border to Python: (codec, width, group).
#pragma once

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <string>
#include <tuple>

#include "../format.h"

using EncodingTuple = std::tuple<std::string, int, int>;

// Throws std::invalid_argument for a codec that is not known, or not of that width and group. Defined in
// ../bind_format.cpp.
edge_moe::Encoding encoding_of(const EncodingTuple& encoding);
