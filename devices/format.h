// The layouts of packed weights in memory and on disk, defined only here; Python reads the definitions from _core.
//
// A matrix (rows, cols) is encoded by a codec, at a width, as one part or several:
//
//     affine    codes, scales, biases. Every row of codes is one little-endian bit stream, value i in bits
//               [i*width, (i+1)*width), cols*width/8 bytes a row. Scales and biases are bfloat16 (rows, cols/group); a
//               weight is scale*code + bias. These are MLX's affine layouts, so Metal uses the bytes as they are.
//     mxfp4     codes, scales: the OCP MX format of that name. Rows of 4-bit codes like affine's, each an E2M1 value: a
//               sign in the highest bit, and 0, 0.5, 1, 1.5, 2, 3, 4 or 6. Scales are bytes (rows, cols/32); a weight
//               is 2^(scale-127) times its value.
//     bfloat16  codes: the values themselves
//     float32   codes: the values themselves (router and norms)
//
// A record is one expert: gate (hidden, dim), up (hidden, dim), down (dim, hidden), each with its parts in order, then,
// if the model has output biases, a float32 vector for each. Experts without a gate have none of its rows, so no parts
// of it; the encoding that is noted for it is that of up. Every part is on a 64-byte boundary, and the record is
// padded to the bundle's record alignment.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace edge_moe {

inline constexpr int kFormatVersion = 2;
inline constexpr int kWidths[] = {1, 2, 3, 4, 5, 6, 8, 16};  // of an expert's matrices
inline constexpr int kGroups[] = {32, 64, 128};
inline constexpr size_t kPartAlignment = 64;     // bytes: one cache line, one AVX-512 register
inline constexpr size_t kDataAlignment = 16384;  // bytes: where the data of an expert file starts; Apple's page
inline constexpr size_t kSmallAlignment = 4096;  // bytes: the minimum that O_DIRECT accepts everywhere

inline constexpr size_t align_up(size_t value, size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

enum class Codec : uint8_t { kAffine, kBfloat16, kFloat32, kMxfp4 };

enum Part { kCodes = 0, kScales = 1, kBiases = 2, kParts = 3 };
inline constexpr const char* kPartNames[kParts] = {"codes", "scales", "biases"};

// The form of a product's inputs: rounded to int8 in blocks of 64, or floats.
enum class InputForm : uint8_t { kRounded, kFloats };

struct CodecTraits {
  Codec codec;
  const char* name;
  InputForm input;
  int parts;                // the first ones of Part
  uint64_t widths;          // bit w is set if the codec has width w
  int largest_group;        // that may share a scale; 0: a codec without scales
  int scale_bytes;          // of a scale, and of a bias
  const char* dtype;        // of codes in a safetensors file
  const char* scale_dtype;  // of scales and biases
};

inline constexpr uint64_t bits_of(std::initializer_list<int> widths) {
  uint64_t bits = 0;
  for (int width : widths) bits |= uint64_t(1) << width;
  return bits;
}

inline constexpr CodecTraits kCodecs[] = {
    {Codec::kAffine, "affine", InputForm::kRounded, 3, bits_of({1, 2, 3, 4, 5, 6, 8}), 128, 2, "U32", "BF16"},
    {Codec::kBfloat16, "bfloat16", InputForm::kFloats, 1, bits_of({16}), 0, 0, "BF16", ""},
    {Codec::kFloat32, "float32", InputForm::kFloats, 1, bits_of({32}), 0, 0, "F32", ""},
    {Codec::kMxfp4, "mxfp4", InputForm::kRounded, 2, bits_of({4}), 32, 1, "U32", "U8"},
};

inline constexpr const CodecTraits& traits(Codec codec) { return kCodecs[int(codec)]; }

// The codec that a width alone implies: the first one that has it.
inline constexpr Codec codec_of(int width) {
  for (const CodecTraits& one : kCodecs)
    if (one.widths >> width & 1) return one.codec;
  return Codec::kAffine;
}

// How a matrix is encoded. group: inputs that share a scale, if the codec has scales.
struct Encoding {
  Codec codec = Codec::kAffine;
  int width = 0, group = 0;
};

inline constexpr size_t codes_bytes(int rows, int cols, int width) { return size_t(rows) * cols * width / 8; }

inline constexpr size_t part_bytes(const Encoding& e, int part, int rows, int cols) {
  if (part == kCodes) return codes_bytes(rows, cols, e.width);
  const CodecTraits& codec = traits(e.codec);
  return part < codec.parts ? size_t(rows) * (cols / e.group) * codec.scale_bytes : 0;
}

enum Projection { kGate = 0, kUp = 1, kDown = 2, kProjections = 3 };
inline constexpr const char* kProjectionNames[kProjections] = {"gate", "up", "down"};

// The place of a part in its record; 0 bytes if there is no such part.
struct Place {
  size_t offset = 0, bytes = 0;
};

struct MatrixLayout {
  int rows = 0, cols = 0;
  Encoding encoding;
  std::array<Place, kParts> parts{};
  Place output_bias;  // float32 (rows,)
};

struct RecordLayout {
  std::array<MatrixLayout, kProjections> matrices{};
  size_t bytes = 0;  // before padding to the record alignment
};

// The layout of one row of a table, whose parts follow one another, and its bytes with the checksum that ends it.
struct RowLayout {
  MatrixLayout row;
  size_t bytes = 0;
};

inline constexpr size_t kRowChecksum = 4;

inline constexpr RowLayout row_layout(const Encoding& encoding, int cols) {
  RowLayout layout{};
  layout.row.rows = 1, layout.row.cols = cols, layout.row.encoding = encoding;
  for (int part = 0; part < kParts; ++part) {
    layout.row.parts[part] = {layout.bytes, part_bytes(encoding, part, 1, cols)};
    layout.bytes += layout.row.parts[part].bytes;
  }
  layout.bytes = align_up(layout.bytes + kRowChecksum, sizeof(float));
  return layout;
}

// The layout of records in new bundles. biased: with output biases. gated: with gates.
inline constexpr RecordLayout record_layout(int dim, int hidden, const std::array<Encoding, kProjections>& encodings,
                                            bool biased, bool gated) {
  RecordLayout layout{};
  auto place = [&](size_t bytes) {
    const Place here = {layout.bytes, bytes};
    layout.bytes = align_up(layout.bytes + bytes, kPartAlignment);
    return here;
  };
  for (int p = 0; p < kProjections; ++p) {
    MatrixLayout& m = layout.matrices[p];
    m.rows = p == kDown ? dim : p == kUp || gated ? hidden : 0;
    m.cols = p == kDown ? hidden : dim;
    m.encoding = encodings[p];
    for (int part = 0; part < kParts; ++part) m.parts[part] = place(part_bytes(m.encoding, part, m.rows, m.cols));
  }
  for (MatrixLayout& m : layout.matrices)
    if (biased) m.output_bias = place(size_t(m.rows) * sizeof(float));
  return layout;
}

}  // namespace edge_moe
