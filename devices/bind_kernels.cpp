// The kernels for Python, each on NumPy arrays (tests).
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "half.h"
#include "kernels.h"
#include "position_sums.h"
#include "python/arrays.h"
#include "python/gil.h"

using namespace edge_moe;

const Kernels& find_kernels(const std::string& name) {
  int count;
  const Kernels* const* tables = available_kernels(&count);
  for (int i = 0; i < count; ++i)
    if (tables[i]->name == name) return *tables[i];
  throw std::invalid_argument("no kernel set '" + name + "' on this machine");
}

namespace {

using Exponents = std::optional<ArrayIn<uint8_t, 2>>;

// A matrix that points into the caller's arrays of codes, scales and biases; with exponents, of mxfp4.
Matrix as_matrix(ArrayIn<uint8_t, 2> codes, ArrayIn<uint16_t, 2> scales, ArrayIn<uint16_t, 2> biases, int cols,
                 int width, const Exponents& exponents) {
  Matrix m;
  m.rows = int(codes.shape(0));
  m.cols = cols;
  expect(width > 0 && width <= 32 && traits(codec_of(width)).widths >> width & 1, "there is no such width");
  m.width = width;
  m.codec = exponents ? Codec::kMxfp4 : codec_of(width);
  expect(!exponents || width == 4, "mxfp4 has width 4");
  expect(codes.shape(1) == codes_bytes(1, cols, width), "codes have the wrong row length for this width");
  m.codes = codes.data();
  if (exponents) {
    expect(exponents->shape(0) == codes.shape(0) && exponents->shape(1) * 32 == size_t(cols),
           "exponents must be of groups of 32");
    m.group = 32;
    m.scales = reinterpret_cast<const uint16_t*>(exponents->data());
  } else if (m.takes_rounded()) {
    expect(scales.shape(0) == codes.shape(0) && scales.shape(1) > 0, "scales have the wrong number of rows");
    expect(biases.shape(0) == scales.shape(0) && biases.shape(1) == scales.shape(1), "biases must have scales' shape");
    m.group = cols / int(scales.shape(1));
    expect(m.group == 32 || m.group == 64 || m.group == 128, "group must be 32, 64 or 128");
    m.scales = scales.data();
    m.biases = biases.data();
  }
  return m;
}

// Inputs (vectors, cols), quantised by one kernel set.
struct Inputs {
  std::vector<int8_t> codes, lows;
  std::vector<uint8_t> two_planes;
  std::vector<float> scales, sums[3];
  Activations x;

  Inputs(const Kernels& kernels, const float* values, int vectors, int cols) {
    x.values = values;
    x.count = vectors;
    x.cols = cols;
    const size_t blocks = x.blocks(), n = vectors;
    codes.resize(n * blocks * kBlock), lows.resize(codes.size());
    two_planes.resize(n * blocks);
    scales.resize(n * blocks);
    sums[0].resize(n * blocks * 2), sums[1].resize(n * blocks), sums[2].resize(n * ((blocks + 1) / 2));
    x.quantised = {
        codes.data(), lows.data(), two_planes.data(), scales.data(), {sums[0].data(), sums[1].data(), sums[2].data()}};
    for (size_t v = 0; v < n; ++v) kernels.quantise(values + v * cols, cols, x.quantised.from(v, cols));
  }
};

}  // namespace

void bind_kernels(nb::module_& m) {
  nb::enum_<Gate>(m, "Gate", "How the products of gate and up become the input of down; see lane_math.h.")
      .value("silu", Gate::kSilu)
      .value("gelu_tanh", Gate::kGelu)
      .value("sigmoid", Gate::kSigmoid)
      .value("clamped_swiglu", Gate::kClamped)
      .value("bilinear", Gate::kBilinear)
      .value("relu2", Gate::kRelu2);

  m.def(
      "convolve",
      [](const std::string& kernels, ArrayIn<float, 2> x, ArrayIn<float, 2> weights, ArrayIn<float, 2> past, int begin,
         int end, bool silu, std::optional<ArrayIn<float, 1>> bias) {
        const size_t tokens = x.shape(0), channels = x.shape(1), kernel = weights.shape(0);
        expect(kernel >= 1 && weights.shape(1) == channels, "weights must be (kernel, channels)");
        expect(past.shape(0) == 0 || (past.shape(0) == kernel - 1 && past.shape(1) == channels),
               "past must be (kernel - 1, channels), or have no rows");
        expect(begin >= 0 && begin <= end && size_t(end) <= channels, "channels must be a range of x");
        expect(!bias || bias->shape(0) == channels, "bias must be (channels,)");
        std::vector<float> y(x.data(), x.data() + tokens * channels), next((kernel - 1) * channels);
        const float* before = past.shape(0) ? past.data() : nullptr;
        const Convolution c = {weights.data(), before,   next.data(), int(kernel),
                               int(channels),  channels, silu,        bias ? bias->data() : nullptr};
        find_kernels(kernels).convolve(c, y.data(), int(tokens), begin, end);
        return std::make_pair(to_numpy(std::move(y), {tokens, channels}),
                              to_numpy(std::move(next), {kernel - 1, channels}));
      },
      nb::arg("kernels"), nb::arg("x"), nb::arg("weights"), nb::arg("past"), nb::arg("begin"), nb::arg("end"),
      nb::arg("silu") = true, nb::arg("bias") = nb::none(),
      "x (tokens, channels) with channels [begin, end) replaced by their convolution or its silu, and the inputs\n"
      "(kernel - 1, channels) that the next tokens need. past: those of the tokens before; without rows: none.");

  m.def(
      "delta_rule",
      [](const std::string& kernels, ArrayIn<float, 2> q, ArrayIn<float, 2> k, ArrayIn<float, 2> v,
         ArrayIn<float, 1> write, ArrayIn<float, 1> decay, ArrayIn<float, 2> state, bool replaces) {
        const size_t tokens = q.shape(0), n = q.shape(1), v_dim = v.shape(1), stride = 2 * n + v_dim;
        expect(k.shape(0) == tokens && k.shape(1) == n && v.shape(0) == tokens && write.shape(0) == tokens &&
                   decay.shape(0) == tokens,
               "q, k, v, write and decay must be of the same tokens");
        expect(state.shape(0) == 0 || (state.shape(0) == n && state.shape(1) == v_dim),
               "state must be (head_dim, v_dim), or have no rows");
        std::vector<float> qkv(tokens * stride), out(tokens * v_dim), to(n * v_dim);
        for (size_t t = 0; t < tokens; ++t) {
          std::copy_n(q.data() + t * n, n, qkv.data() + t * stride);
          std::copy_n(k.data() + t * n, n, qkv.data() + t * stride + n);
          std::copy_n(v.data() + t * v_dim, v_dim, qkv.data() + t * stride + 2 * n);
        }
        const DeltaHead head = {
            qkv.data(), qkv.data() + n, qkv.data() + 2 * n, write.data(), decay.data(), out.data(), stride,
            1,          v_dim,          int(tokens),        int(n),       int(v_dim),   replaces};
        find_kernels(kernels).delta_rule(head, state.shape(0) ? state.data() : nullptr, to.data());
        return std::make_pair(to_numpy(std::move(out), {tokens, v_dim}), to_numpy(std::move(to), {n, v_dim}));
      },
      nb::arg("kernels"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("write"), nb::arg("decay"),
      nb::arg("state"), nb::arg("replaces") = true,
      "Take one head of a gated delta net, or with replaces off of Mamba-2, through some tokens: q, k (tokens, "
      "head_dim), v (tokens, v_dim), write,\n"
      "decay (tokens,), state (head_dim, v_dim), without rows: zeros -> values (tokens, v_dim), the state after them.");

  m.def(
      "kernel_names",
      [] {
        int count;
        const Kernels* const* tables = available_kernels(&count);
        std::vector<std::string> names;
        for (int i = 0; i < count; ++i) names.push_back(tables[i]->name);
        return names;
      },
      "Kernel sets that this machine runs, fastest first; 'scalar' is always the last.");

  m.def(
      "matmul",
      [](const std::string& kernels, ArrayIn<uint8_t, 2> codes, ArrayIn<uint16_t, 2> scales,
         ArrayIn<uint16_t, 2> biases, int width, ArrayIn<float, 2> x, std::optional<ArrayIn<int32_t, 1>> vectors,
         int row_begin, std::optional<int> row_end, const Exponents& exponents) {
        const Kernels& k = find_kernels(kernels);
        const int cols = int(x.shape(1)), rows = int(codes.shape(0)), end = row_end.value_or(rows);
        expect(row_begin >= 0 && row_begin <= end && end <= rows, "rows must be a range of the matrix");
        Matrix matrix = as_matrix(codes, scales, biases, cols, width, exponents);
        Inputs inputs(k, x.data(), int(x.shape(0)), cols);
        if (vectors) {
          inputs.x.rows = vectors->data();
          inputs.x.count = int(vectors->shape(0));
          for (size_t t = 0; t < vectors->shape(0); ++t)
            expect(inputs.x.rows[t] >= 0 && inputs.x.rows[t] < int(x.shape(0)), "vectors must be rows of x");
        }
        const int tokens = inputs.x.count;
        std::vector<float> y(size_t(tokens) * rows);
        {
          GilReleased released;
          k.matmul(matrix, inputs.x, y.data(), rows, row_begin, end);
        }
        return to_numpy(std::move(y), {size_t(tokens), size_t(rows)});
      },
      nb::arg("kernels"), nb::arg("codes"), nb::arg("scales"), nb::arg("biases"), nb::arg("width"), nb::arg("x"),
      nb::arg("vectors") = nb::none(), nb::arg("row_begin") = 0, nb::arg("row_end") = nb::none(),
      nb::arg("exponents") = nb::none(),
      "x (tokens, cols) times a packed matrix (rows, cols), by one kernel set: (tokens, rows) float32.\n\n"
      "codes: uint8 (rows, cols*width/8); scales, biases: bfloat16 bits as uint16 (rows, cols/group). Width "
      "32 takes\n"
      "float32 bytes as codes; at widths 16 and 32 scales and biases are ignored, and so they are "
      "with exponents, uint8\n(rows, cols/32), which make it mxfp4. vectors: int32 (tokens,), "
      "the row of x\n"
      "for each token; rows outside of [row_begin, row_end) stay zero.");

  m.def(
      "dequantise",
      [](const std::string& kernels, ArrayIn<uint8_t, 2> codes, ArrayIn<uint16_t, 2> scales,
         ArrayIn<uint16_t, 2> biases, int width, int cols, const Exponents& exponents) {
        const Kernels& k = find_kernels(kernels);
        Matrix matrix = as_matrix(codes, scales, biases, cols, width, exponents);
        std::vector<float> y(size_t(matrix.rows) * cols);
        {
          GilReleased released;
          for (int row = 0; row < matrix.rows; ++row) k.dequantise_row(matrix, row, &y[size_t(row) * cols]);
        }
        return to_numpy(std::move(y), {size_t(matrix.rows), size_t(cols)});
      },
      nb::arg("kernels"), nb::arg("codes"), nb::arg("scales"), nb::arg("biases"), nb::arg("width"), nb::arg("cols"),
      nb::arg("exponents") = nb::none(), "A packed matrix as float32 (rows, cols); arguments as for matmul.");

  m.def(
      "quantise_activations",
      [](const std::string& kernels, ArrayIn<float, 1> x) {
        const int cols = int(x.shape(0));
        Inputs q(find_kernels(kernels), x.data(), 1, cols);
        const size_t blocks = q.x.blocks();
        q.two_planes.resize(blocks);
        return nb::make_tuple(to_numpy(std::move(q.codes), {blocks * kBlock}),
                              to_numpy(std::move(q.lows), {blocks * kBlock}),
                              to_numpy(std::move(q.two_planes), {blocks}), to_numpy(std::move(q.scales), {blocks}),
                              to_numpy(std::move(q.sums[0]), {blocks * 2}), to_numpy(std::move(q.sums[1]), {blocks}),
                              to_numpy(std::move(q.sums[2]), {(blocks + 1) / 2}));
      },
      nb::arg("kernels"), nb::arg("x"),
      "One vector in int8 blocks of 64: (codes, lows, two_planes, scales, sums32, sums64, sums128).\n\n"
      "An input is scales * (codes + lows / 256); blocks where two_planes is 0 have no lows.");

  m.def(
      "rms_norm",
      [](const std::string& kernels, ArrayIn<float, 1> x, ArrayIn<float, 1> weight, float eps) {
        expect(x.shape(0) == weight.shape(0), "x and weight differ in length");
        std::vector<float> y(x.shape(0));
        find_kernels(kernels).rms_norm(x.data(), weight.data(), eps, y.data(), int(y.size()));
        return to_numpy(std::move(y), {x.shape(0)});
      },
      nb::arg("kernels"), nb::arg("x"), nb::arg("weight"), nb::arg("eps"), "x / sqrt(mean(x^2) + eps) * weight.");

  m.def(
      "layer_norm",
      [](const std::string& kernels, ArrayIn<float, 1> x, ArrayIn<float, 1> weight, ArrayIn<float, 1> bias, float eps) {
        expect(x.shape(0) == weight.shape(0) && x.shape(0) == bias.shape(0), "x, weight and bias differ in length");
        std::vector<float> y(x.shape(0));
        find_kernels(kernels).layer_norm(x.data(), weight.data(), bias.data(), eps, y.data(), int(y.size()));
        return to_numpy(std::move(y), {x.shape(0)});
      },
      nb::arg("kernels"), nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("eps"),
      "(x - mean(x)) / sqrt(var(x) + eps) * weight + bias.");

  m.def(
      "gate_up",
      [](const std::string& kernels, ArrayIn<float, 1> gate, ArrayIn<float, 1> up, Gate gate_kind, float alpha,
         float limit) {
        expect(gate.shape(0) == up.shape(0), "gate and up differ in length");
        std::vector<float> y(gate.data(), gate.data() + gate.shape(0));
        find_kernels(kernels).gate_up(y.data(), up.data(), int(y.size()), {gate_kind, alpha, limit});
        return to_numpy(std::move(y), {gate.shape(0)});
      },
      nb::arg("kernels"), nb::arg("gate"), nb::arg("up"), nb::arg("activation"), nb::arg("alpha") = 0.0f,
      nb::arg("limit") = 0.0f, "The input of down, by the products of gate and up; see lane_math.h's gated().");

  m.def(
      "softmax",
      [](const std::string& kernels, ArrayIn<float, 1> x, float sink) {
        std::vector<float> y(x.data(), x.data() + x.shape(0));
        find_kernels(kernels).softmax(y.data(), 0, int(y.size()), sink);
        return to_numpy(std::move(y), {x.shape(0)});
      },
      nb::arg("kernels"), nb::arg("x"), nb::arg("sink") = kNoSink,
      "softmax of one vector and a sink, whose share is dropped.");

  m.def(
      "attend",
      [](const std::string& kernels, ArrayIn<float, 2> q, ArrayIn<float, 2> k, ArrayIn<float, 2> v, int begin,
         float scale, bool half) {
        const Kernels& its = find_kernels(kernels);
        const int queries = int(q.shape(0)), head_dim = int(q.shape(1)), end = int(k.shape(0)), n = int(v.shape(1));
        expect(int(k.shape(1)) == head_dim && int(v.shape(0)) == end, "k and v must have the same number of positions");
        expect(begin >= 0 && begin < end, "begin must be a position");
        const size_t positions = align_up(end, kKeyBlock);
        std::vector<float> keys(positions * head_dim), scores(queries * positions), out(size_t(queries) * n);
        for (size_t i = 0; i < size_t(end) * head_dim; ++i) {
          const size_t at = i / head_dim, d = i % head_dim;
          keys[(at / kKeyBlock * head_dim + d) * kKeyBlock + at % kKeyBlock] = k.data()[i];
        }
        auto halves_of = [](const float* from, size_t count) {
          std::vector<uint16_t> halves(count);
          std::transform(from, from + count, halves.begin(), float_to_half);
          return halves;
        };
        const std::vector<uint16_t> half_keys = halves_of(keys.data(), keys.size());
        const std::vector<uint16_t> half_values = halves_of(v.data(), size_t(end) * n);
        KeyValues cache{keys.data(), v.data(), size_t(n), half};
        if (half) cache.keys = half_keys.data(), cache.values = half_values.data();
        std::vector<const float*> q_rows;
        std::vector<float*> out_rows;
        for (int i = 0; i < queries; ++i) {
          q_rows.push_back(q.data() + size_t(i) * head_dim);
          out_rows.push_back(out.data() + size_t(i) * n);
        }
        its.attend_scores(q_rows.data(), queries, cache, begin, end, head_dim, scale, scores.data(), positions);
        for (int i = 0; i < queries; ++i) its.softmax(scores.data() + i * positions, begin, end, kNoSink);
        std::vector<float> pieces(out.size());
        std::vector<float*> piece_rows;
        for (int i = 0; i < queries; ++i) piece_rows.push_back(pieces.data() + size_t(i) * n);
        sum_positions(begin, end, queries, n, out_rows.data(), piece_rows.data(), [&](int from, int to, auto rows) {
          its.attend_values(scores.data(), positions, queries, cache, from, to, n, rows);
        });
        return to_numpy(std::move(out), {size_t(queries), size_t(n)});
      },
      nb::arg("kernels"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("begin"), nb::arg("scale"),
      nb::arg("half") = false,
      "Queries (queries, head_dim) over keys (positions, head_dim) and values (positions, n) from `begin` on; half: "
      "keys\n"
      "and values are rounded to half precision.");

  m.def(
      "to_half",
      [](ArrayIn<float, 1> x) {
        std::vector<uint16_t> halves(x.shape(0));
        std::transform(x.data(), x.data() + x.shape(0), halves.begin(), float_to_half);
        return to_numpy(std::move(halves), {x.shape(0)});
      },
      nb::arg("x"), "The bits of float32 values as half precision.");
  m.def(
      "from_half",
      [](const std::string& kernels, ArrayIn<uint16_t, 1> x) {
        std::vector<float> y(x.shape(0));
        find_kernels(kernels).widen(x.data(), y.data(), int(y.size()));
        return to_numpy(std::move(y), {x.shape(0)});
      },
      nb::arg("kernels"), nb::arg("x"), "The float32 values of half-precision bits.");
}
