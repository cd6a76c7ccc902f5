// Products of many tokens against scalar.cpp: matrices of several widths on tokens of their own, in one launch.
#include <algorithm>

#include "../../devices/cuda/prefill.h"
#include "check_cuda.h"

void check_prefill() {
  for (int group : {32, 64, 128})
    for (int groups : {1, 3, 6})
      for (int rows : {16, 70, 128}) {
        const int cols = group * groups, vectors = 90;
        Vectors x(vectors, cols);
        x.quantise();
        Values<int32_t> gathered(static_cast<size_t>(vectors));
        for (int t = 0; t < vectors; ++t) gathered[t] = t * 37 % vectors;
        const int widths[] = {1, 2, 3, 4, 5, 6, 8, kMxfp4}, counts[] = {1, 8, 67, 64, 0, 90, 3, 66};
        std::vector<Packed> matrices;
        matrices.reserve(8);
        std::vector<cuda::ProductJob> jobs;
        // Every third job's vectors are `step` apart, and all outputs have room between them.
        const int step = 4;
        const size_t stride = size_t(rows) + 9;
        size_t outs = 0;
        for (int i = 0; i < 8; ++i) {
          const int own_rows = i == 2 ? rows - 5 : rows,
                    count = i % 3 == 1 ? std::min(counts[i], vectors / step) : counts[i];
          matrices.emplace_back(own_rows, cols, widths[i], group);
          if (i % 3 == 1)
            jobs.push_back({matrices.back().matrix, nullptr, stride, nullptr, 2, step, count});
          else
            jobs.push_back({matrices.back().matrix, nullptr, stride, gathered.data(), 0, 1, count});
          outs += count * stride;
        }
        Floats want(outs, 0.0f), got(outs, 0.0f), few(outs, 0.0f);
        for (Floats* to : {&want, &got, &few}) {
          size_t at = 0;
          for (cuda::ProductJob& job : jobs) {
            job.y = to->data() + at;
            at += job.count * stride;
            Values<int32_t> rows_of_job(static_cast<size_t>(job.count));
            for (int t = 0; t < job.count; ++t) rows_of_job[t] = int32_t(job.vector(t));
            Activations a = x.activations(0, job.count);
            a.rows = rows_of_job.data();
            if (to == &want) kScalarKernels.matmul(job.matrix, a, job.y, stride, 0, job.matrix.rows);
          }
          if (to == &got) cuda::products(jobs.data(), int(jobs.size()), x.buffer(), nullptr);
          if (to == &few) cuda::product(jobs.data(), int(jobs.size()), x.buffer(), nullptr);
        }
        compare("one by one, group " + std::to_string(group), few, want);
        compare("products, group " + std::to_string(group) + ", " + std::to_string(rows) + " x " + std::to_string(cols),
                got, want);
      }
}
