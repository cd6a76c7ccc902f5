// The CUDA kernels, run by a GPU or by simt.h's stand-in, against scalar.cpp, bit for bit. Buffers are as large as the
// kernels may touch, for builds with an address sanitizer and for compute-sanitizer.
//
//     check_cuda [quick]    prints how many cases there were; exits with 1 where one differs. quick: fewer, for tools
//                           that slow every access down.
#include "check_cuda.h"

#include <algorithm>
#include <numeric>
#include <utility>

static void check_quantise() {
  for (int cols : {1, 31, 32, 64, 96, 100, 700, 2048})
    for (int kind : {0, 1, 2}) {
      Vectors want(3, cols), got(3, cols, want.values);
      for (auto* vectors : {&want, &got}) {
        if (kind == 1) std::fill(vectors->values.begin(), vectors->values.end(), 0.0f);
        if (kind == 2) vectors->values[cols / 2] = INFINITY, vectors->values[cols - 1] = NAN;
      }
      want.quantise();
      cuda::quantise(got.values.data(), 3, got.buffer(), nullptr);
      const std::string what = "quantise " + std::to_string(cols) + ", kind " + std::to_string(kind);
      compare(what + ", codes", got.codes, want.codes);
      compare(what + ", lows", got.lows, want.lows);
      compare(what + ", planes", got.two_planes, want.two_planes);
      compare(what + ", scales", got.scales, want.scales);
      compare(what + ", sums over 32", got.sums[0], want.sums[0]);
      compare(what + ", sums over 64", got.sums[1], want.sums[1]);
    }
}

static void check_product() {
  for (int width : {kMxfp4, 1, 2, 3, 4, 5, 6, 8})
    for (int group : {32, 64, 128})
      for (int groups : {1, 3, 12, 70})
        for (int rows : {1, 16, 65, 130}) {
          if (groups == 70 && rows != 65) continue;
          const int cols = group * groups, vectors = rows == 65 ? 1 : 2;
          const Packed packed(rows, cols, width, group);
          Vectors x(vectors, cols);
          x.quantise();
          Floats want(size_t(vectors) * rows), got(want.size());
          kScalarKernels.matmul(packed.matrix, x.activations(0, vectors), want.data(), rows, 0, rows);
          const cuda::ProductJob job = cuda::whole(packed.matrix, vectors, got.data());
          cuda::product(&job, 1, x.buffer(), nullptr);
          compare(std::to_string(width) + " bits, group " + std::to_string(group) + ", " + std::to_string(rows) +
                      " x " + std::to_string(cols),
                  got, want);
        }
}

// A layer's chosen experts, each with widths of its own, in two launches as when some have to be read first.
static void check_experts(int dim, int hidden, int group, int count, const Activation& activation) {
  const int widths[] = {2, 3, 4, kMxfp4, 8, 1, 6, 5};
  std::vector<Packed> matrices;
  matrices.reserve(3 * count);
  std::vector<cuda::ExpertJob> jobs;
  const int vectors = 2;
  for (int i = 0; i < count; ++i) {
    for (int part = 0; part < 3; ++part) {
      const bool is_down = part == 2;
      matrices.emplace_back(is_down ? dim : hidden, is_down ? hidden : dim, widths[(i + part) % 8], group);
    }
    const size_t at = matrices.size() - 3;
    jobs.push_back({matrices[at].matrix, matrices[at + 1].matrix, matrices[at + 2].matrix, i % vectors, count - 1 - i});
  }
  Vectors x(vectors, dim);
  x.quantise();
  Floats weights = floats(size_t(count)), residual = floats(size_t(dim)), want_x = residual;
  std::vector<int> pair_of(count);
  std::iota(pair_of.begin(), pair_of.end(), 0);
  if (count > 2) pair_of[1] = -1;

  Vectors hidden_want(count, hidden);
  Floats want(size_t(count) * dim);
  for (const cuda::ExpertJob& job : jobs) {
    Floats up(static_cast<size_t>(hidden));
    float* gate = &hidden_want.values[size_t(job.pair) * hidden];
    const Activations input = x.activations(job.vector, 1);
    kScalarKernels.matmul(job.gate, input, gate, hidden, 0, hidden);
    kScalarKernels.matmul(job.up, input, up.data(), hidden, 0, hidden);
    kScalarKernels.gate_up(gate, up.data(), hidden, activation);
  }
  hidden_want.quantise();
  for (const cuda::ExpertJob& job : jobs)
    kScalarKernels.matmul(job.down, hidden_want.activations(job.pair, 1), &want[size_t(job.pair) * dim], dim, 0, dim);
  for (int k = 0; k < count; ++k)
    if (pair_of[k] >= 0) kScalarKernels.add_scaled(want_x.data(), &want[size_t(pair_of[k]) * dim], weights[k], dim);

  Vectors hidden_got(count, hidden);
  Floats got(want.size(), NAN), got_x = residual;
  cuda::RankedSum none{nullptr, 0, dim, {}, {}}, sum{got_x.data(), count, dim, {}, {}};
  std::copy(weights.begin(), weights.end(), sum.weights);
  std::copy(pair_of.begin(), pair_of.end(), sum.pairs);
  const int first = count / 2;
  for (auto [begin, end] : {std::pair{0, first}, std::pair{first, count}}) {
    if (begin == end) continue;
    cuda::gate_up(&jobs[begin], end - begin, hidden, x.buffer(), hidden_got.buffer(), activation, nullptr);
    cuda::down(&jobs[begin], end - begin, hidden_got.buffer(), got.data(), end == count ? sum : none, nullptr);
  }
  const std::string what = std::to_string(count) + " experts " + std::to_string(dim) + " x " + std::to_string(hidden) +
                           ", group " + std::to_string(group) + ", activation " + std::to_string(int(activation.gate));
  compare(what + ", hidden", hidden_got.codes, hidden_want.codes);
  compare(what + ", hidden's scales", hidden_got.scales, hidden_want.scales);
  compare(what + ", down", got, want);
  compare(what + ", sum", got_x, want_x);
}

int main(int count, char** arguments) try {
  const bool quick = count > 1 && arguments[1] == std::string("quick");
  cuda::open();
  check_quantise();
  if (!quick) check_product();
  for (int group : {32, 64, 128})
    for (const Activation& activation : kActivations) {
      check_experts(256, 128, group, 8, activation);
      if (quick) break;
      check_experts(group, 3 * group, group, 1, activation);
      check_experts(5 * group, group, group, 13, activation);
      check_experts(group, group, group, 32, activation);
    }
  if (!quick) check_experts(2048, 768, 64, 8, {});
  check_layer();
  check_delta();
  check_index();
  check_sparse();
  check_streams();
  check_latent();
  check_rows();
  check_prefill();
  std::printf("%d\n", cases);
  return failures ? 1 : 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
