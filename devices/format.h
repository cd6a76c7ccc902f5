// The packed layouts: how weights lie in memory and on disk. The one definition; Python reads it from _core.
//
// A matrix (rows, cols) of width b < 16 has three parts. Codes: every row is one little-endian bit stream, value i
// in bits [i*b, (i+1)*b), cols*b/8 bytes a row. Scales and biases: bfloat16 (rows, cols/group); a weight is
// scale*code + bias. These are MLX's affine layouts, so Metal uses the bytes as they are. Width 16 is bfloat16
// itself and width 32 float32 (router and norms); both have codes alone.
//
// A record is one expert: gate (hidden, dim), up (hidden, dim), down (dim, hidden), each as codes, scales, biases,
// every part on a 64-byte boundary, the whole padded to the bundle's record alignment.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace edge_moe {

inline constexpr int kFormatVersion = 1;
inline constexpr int kWidths[] = {1, 2, 3, 4, 5, 6, 8, 16};
inline constexpr int kGroups[] = {32, 64, 128};
inline constexpr size_t kPartAlignment = 64;     // bytes: one cache line, one AVX-512 register
inline constexpr size_t kDataAlignment = 16384;  // bytes: where the data of an expert file starts; Apple's page
inline constexpr size_t kSmallAlignment = 4096;  // bytes: the least that O_DIRECT accepts everywhere

inline constexpr size_t align_up(size_t value, size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

enum Projection { kGate = 0, kUp = 1, kDown = 2 };

// Where the parts of one matrix lie, in bytes from the start of its record.
struct MatrixLayout {
  int rows, cols, width, group;
  size_t codes, scales, biases;      // offsets
  size_t codes_bytes, scales_bytes;  // biases are as long as scales
};

struct RecordLayout {
  std::array<MatrixLayout, 3> matrices;  // gate, up, down
  size_t bytes;                          // of the three, before padding to the record alignment
};

inline constexpr size_t codes_bytes(int rows, int cols, int width) { return size_t(rows) * cols * width / 8; }

inline constexpr size_t scales_bytes(int rows, int cols, int width, int group) {
  return width < 16 ? size_t(rows) * (cols / group) * 2 : 0;
}

inline constexpr RecordLayout record_layout(int dim, int hidden, std::array<int, 3> widths, int group) {
  RecordLayout layout{};
  size_t at = 0;
  for (int p = 0; p < 3; ++p) {
    MatrixLayout& m = layout.matrices[p];
    m.rows = p == kDown ? dim : hidden;
    m.cols = p == kDown ? hidden : dim;
    m.width = widths[p];
    m.group = group;
    m.codes_bytes = codes_bytes(m.rows, m.cols, m.width);
    m.scales_bytes = scales_bytes(m.rows, m.cols, m.width, group);
    m.codes = at;
    m.scales = align_up(m.codes + m.codes_bytes, kPartAlignment);
    m.biases = align_up(m.scales + m.scales_bytes, kPartAlignment);
    at = align_up(m.biases + m.scales_bytes, kPartAlignment);
  }
  layout.bytes = at;
  return layout;
}

}  // namespace edge_moe
