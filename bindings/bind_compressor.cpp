// The compressor's compiled parts for Python: quantising a matrix.
#include <nanobind/stl/optional.h>

#include "../compressor/src/quantise.h"
#include "../devices/format.h"
#include "arrays.h"

using namespace edge_moe;

void bind_compressor(nb::module_& m) {
  m.def(
      "quantise_matrix",
      [](ArrayIn<float, 2> weights, int width, int group, std::optional<ArrayIn<float, 1>> importance, bool search,
         int threads) {
        const int rows = int(weights.shape(0)), cols = int(weights.shape(1));
        expect(width >= 1 && width <= 8 && width != 7, "width must be 1, 2, 3, 4, 5, 6 or 8");
        expect(group == 32 || group == 64 || group == 128, "group must be 32, 64 or 128");
        expect(cols % group == 0, "cols must be a multiple of group");
        expect(!importance || importance->shape(0) == weights.shape(1), "importance must have one value a column");
        std::vector<uint8_t> codes(codes_bytes(rows, cols, width));
        std::vector<uint16_t> scales(size_t(rows) * (cols / group)), biases(scales.size());
        {
          nb::gil_scoped_release release;
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
      "importance: float32 (cols,), how much the squared error of each input counts; None counts all alike. search: "
      "off is plain round to nearest.\n"
      "Returns codes uint8 (rows, cols*width/8), scales and biases as bfloat16 bits, uint16 (rows, cols/group).");
}
