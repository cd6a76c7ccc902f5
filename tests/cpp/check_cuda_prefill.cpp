// Products of many tokens against scalar.cpp: matrices of several widths on tokens of their own, in one launch.
#include "../../devices/cuda/prefill.h"
#include "check_cuda.h"

void check_prefill() {
  for (int group : {32, 64, 128})
    for (int groups : {1, 3, 6})
      for (int rows : {16, 70, 128}) {
        const int cols = group * groups, vectors = 90;
        Vectors x(vectors, cols);
        x.quantise();
        std::vector<int32_t> gathered(static_cast<size_t>(vectors));
        for (int t = 0; t < vectors; ++t) gathered[t] = t * 37 % vectors;
        const int widths[] = {1, 2, 3, 4, 5, 6, 8}, counts[] = {1, 8, 67, 64, 0, 90, 3};
        std::vector<Packed> matrices;
        matrices.reserve(7);
        std::vector<cuda::ProductJob> jobs;
        int outs = 0;
        for (int i = 0; i < 7; ++i) {
          matrices.emplace_back(rows, cols, widths[i], group);
          jobs.push_back({matrices.back().matrix, i % 2 ? nullptr : gathered.data(), i % 2 ? vectors - counts[i] : 0,
                          counts[i], outs});
          outs += counts[i];
        }
        std::vector<float> want(size_t(outs) * rows), got(want.size(), NAN);
        for (const cuda::ProductJob& job : jobs) {
          Activations a = x.activations(job.vectors ? 0 : job.first_vector % vectors, job.count);
          a.rows = job.vectors;
          if (job.count) kScalarKernels.matmul(job.matrix, a, &want[size_t(job.first_out) * rows], rows, 0, rows);
        }
        cuda::products(jobs.data(), int(jobs.size()), rows, vectors, x.buffer(), got.data(), nullptr);
        compare("products, group " + std::to_string(group) + ", " + std::to_string(rows) + " x " + std::to_string(cols),
                got, want);
      }
}
