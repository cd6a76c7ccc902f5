// Python bindings of sampling: runtime/sampling.py validates the options and makes one Sampler per answer.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "../../devices/python/arrays.h"
#include "../../devices/python/gil.h"
#include "sampler.h"

using namespace edge_moe;

namespace {

using Logits = ArrayIn<float, 1>;

std::span<const float> row(const Logits& logits) {
  expect(logits.shape(0) > 0, "there are no logits");
  return {logits.data(), logits.shape(0)};
}

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::class_<Sampler>(m, "Sampler", "Draws the tokens of one answer; see sampler.h and sampling.py.")
      .def(
          "__init__",
          [](Sampler* self, float temperature, float top_p, int top_k, float min_p, float repetition_penalty,
             float presence_penalty, float frequency_penalty, std::vector<std::pair<int32_t, float>> logit_bias,
             uint64_t seed, ArrayIn<int32_t, 1> prompt) {
            int count;
            new (self) Sampler({temperature, top_p, min_p, top_k, repetition_penalty, presence_penalty,
                                frequency_penalty, std::move(logit_bias), seed},
                               {prompt.data(), prompt.shape(0)}, *available_kernels(&count)[0]);
          },
          nb::arg("temperature"), nb::arg("top_p"), nb::arg("top_k"), nb::arg("min_p"), nb::arg("repetition_penalty"),
          nb::arg("presence_penalty"), nb::arg("frequency_penalty"), nb::arg("logit_bias"), nb::arg("seed"),
          nb::arg("prompt"))
      .def(
          "__call__",
          [](Sampler& self, Logits logits) {
            const std::span<const float> its = row(logits);
            GilReleased released;
            return self(its);
          },
          nb::arg("logits"), "logits: float32 (vocab,) -> the next token id, which is appended to the answer.")
      .def(
          "with_logprobs",
          [](Sampler& self, Logits logits, int count) {
            const std::span<const float> its = row(logits);
            Drawn drawn;
            {
              GilReleased released;
              drawn = self.with_logprobs(its, count);
            }
            std::vector<std::pair<int32_t, double>> likeliest;
            for (const Logprob& one : drawn.likeliest) likeliest.push_back({one.token, one.value});
            return std::make_tuple(drawn.token.token, drawn.token.value, likeliest);
          },
          nb::arg("logits"), nb::arg("count"),
          "The same, as (token id, its log probability, those of the `count` likeliest tokens), after bias and\n"
          "penalties and before temperature.");
  m.def(
      "largest",
      [](Logits values, int count) {
        expect(count >= 1 && size_t(count) <= values.shape(0), "count must be 1 to the number of values");
        std::vector<int32_t> found = largest(row(values), count);
        const size_t size = found.size();
        return to_numpy(std::move(found), {size});
      },
      nb::arg("values"), nb::arg("count"), nb::rv_policy::move,
      "Indices, ascending, of the `count` largest values; ties go to the lower index.");
  m.def(
      "likeliest",
      [](Logits weights, double share) {
        std::vector<int32_t> found = likeliest(row(weights), share);
        const size_t size = found.size();
        return to_numpy(std::move(found), {size});
      },
      nb::arg("weights"), nb::arg("share"), nb::rv_policy::move,
      "Indices, ascending, of the fewest weights that reach `share` of their sum; ties go to the lower index.");
}
