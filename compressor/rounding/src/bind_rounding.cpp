// Python bindings of the compressor's compiled parts: round to nearest, and GPTQ on a group of columns.
#include <nanobind/stl/optional.h>

#include "../../../devices/format.h"
#include "../../../devices/python/arrays.h"
#include "../../../devices/python/gil.h"
#include "affine.h"
#include "gptq.h"
#include "quantise.h"

using namespace edge_moe;

namespace {

using Floats = std::vector<float>;

void expect_width(int width) { expect(width >= 1 && width <= 8 && width != 7, "width must be 1, 2, 3, 4, 5, 6 or 8"); }

void expect_group(size_t n, const ArrayIn<float, 2>& square) {
  expect(n == 32 || n == 64 || n == 128, "a group has 32, 64 or 128 columns");
  expect(square.shape(0) == n && square.shape(1) == n, "the block must be (n, n) for n columns");
}

}  // namespace

void bind_rounding(nb::module_& m) {
  m.def(
      "quantise_matrix",
      [](ArrayIn<float, 2> weights, int width, int group, std::optional<ArrayIn<float, 1>> importance, bool search,
         int threads) {
        const int rows = int(weights.shape(0)), cols = int(weights.shape(1));
        expect_width(width);
        expect(group == 32 || group == 64 || group == 128, "group must be 32, 64 or 128");
        expect(cols % group == 0, "cols must be a multiple of group");
        expect(!importance || importance->shape(0) == weights.shape(1), "importance must have one value a column");
        std::vector<uint8_t> codes(codes_bytes(rows, cols, width));
        std::vector<uint16_t> scales(size_t(rows) * (cols / group)), biases(scales.size());
        {
          GilReleased released;
          quantise_matrix(weights.data(), rows, cols, width, group, importance ? importance->data() : nullptr, search,
                          threads, {codes.data(), scales.data(), biases.data()});
        }
        return nb::make_tuple(to_numpy(std::move(codes), {size_t(rows), codes_bytes(1, cols, width)}),
                              to_numpy(std::move(scales), {size_t(rows), size_t(cols / group)}),
                              to_numpy(std::move(biases), {size_t(rows), size_t(cols / group)}));
      },
      nb::arg("weights"), nb::arg("width"), nb::arg("group"), nb::arg("importance") = nb::none(),
      nb::arg("search") = true, nb::arg("threads") = 1,
      "Round a float32 matrix (rows, cols) to `width` bits in groups of `group` inputs, with a searched range.\n\n"
      "importance: float32 (cols,), the weight of each input's squared error; None weights all equally. search: off is "
      "plain round to nearest.\n"
      "Returns codes uint8 (rows, cols*width/8), scales and biases as bfloat16 bits, uint16 (rows, cols/group).");

  m.def(
      "gptq_group",
      [](ArrayIn<float, 2> weights, int width, ArrayIn<float, 2> factor, int threads) {
        const size_t rows = weights.shape(0), n = weights.shape(1);
        expect_width(width);
        expect_group(n, factor);
        Floats w(weights.data(), weights.data() + rows * n), scales(rows), biases(rows), errors(rows * n);
        std::vector<uint8_t> codes(rows * n);
        {
          GilReleased released;
          gptq_group({int(rows), int(n), w.data(), codes.data(), scales.data(), biases.data()}, width, factor.data(),
                     errors.data(), threads);
        }
        return nb::make_tuple(to_numpy(std::move(codes), {rows, n}), to_numpy(std::move(scales), {rows}),
                              to_numpy(std::move(biases), {rows}), to_numpy(std::move(errors), {rows, n}));
      },
      nb::arg("weights"), nb::arg("width"), nb::arg("factor"), nb::arg("threads") = 1,
      "GPTQ on one group of columns, float32 (rows, n): fit scale and bias, then round column by column and propagate "
      "each error.\n\n"
      "factor: float32 (n, n), the diagonal block of the upper triangular R with inverse(H) = R^T R.\n"
      "Returns codes uint8 (rows, n), scales and biases float32 (rows,), errors float32 (rows, n): subtract errors @ "
      "R[group, later] from later columns.");

  m.def(
      "refine_group",
      [](ArrayIn<uint8_t, 2> codes, ArrayIn<float, 1> scales, ArrayIn<float, 1> biases, int width,
         ArrayIn<float, 2> gradient, ArrayIn<float, 2> moment, int rounds, int threads) {
        const size_t rows = codes.shape(0), n = codes.shape(1);
        expect_width(width);
        expect_group(n, moment);
        expect(scales.shape(0) == rows && biases.shape(0) == rows, "scales and biases must have one value a row");
        expect(gradient.shape(0) == rows && gradient.shape(1) == n, "gradient must be as large as codes");
        std::vector<uint8_t> q(codes.data(), codes.data() + rows * n);
        Floats s(scales.data(), scales.data() + rows), b(biases.data(), biases.data() + rows), change(rows * n);
        {
          GilReleased released;
          refine_group({int(rows), int(n), nullptr, q.data(), s.data(), b.data()}, width, gradient.data(),
                       moment.data(), rounds, change.data(), threads);
        }
        return nb::make_tuple(to_numpy(std::move(q), {rows, n}), to_numpy(std::move(s), {rows}),
                              to_numpy(std::move(b), {rows}), to_numpy(std::move(change), {rows, n}));
      },
      nb::arg("codes"), nb::arg("scales"), nb::arg("biases"), nb::arg("width"), nb::arg("gradient"), nb::arg("moment"),
      nb::arg("rounds") = 1, nb::arg("threads") = 1,
      "Lower tr(E H E^T) over one group's scale, bias and codes, with the other groups fixed.\n\n"
      "gradient: float32 (rows, n), the group's columns of E H; moment: float32 (n, n), the diagonal block of H.\n"
      "Returns codes, scales, biases, and the change of E's columns, float32 (rows, n).");

  m.def(
      "pack_codes",
      [](ArrayIn<uint8_t, 2> codes, int width) {
        const size_t rows = codes.shape(0), cols = codes.shape(1);
        expect_width(width);
        expect(cols % 32 == 0, "cols must be a multiple of 32");
        const size_t row_bytes = codes_bytes(1, int(cols), width);
        std::vector<uint8_t> packed(rows * row_bytes);
        {
          GilReleased released;
          for (size_t row = 0; row < rows; ++row)
            pack_codes(codes.data() + row * cols, int(cols), width, packed.data() + row * row_bytes, 0);
        }
        return to_numpy(std::move(packed), {rows, row_bytes});
      },
      nb::arg("codes"), nb::arg("width"),
      "Pack codes, one per byte (rows, cols), into the bit streams of a bundle, uint8 (rows, cols*width/8).");
}
