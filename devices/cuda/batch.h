// Jobs as a kernel's argument: they come with the launch, so nothing has to be copied first or kept until it is done.
#pragma once

#include <algorithm>

namespace edge_moe::cuda {

inline constexpr int kArguments = 3072;  // bytes that the jobs of a launch may take; all its arguments may have 4096

template <typename Job>
struct Batch {
  static constexpr int kMost = kArguments / int(sizeof(Job));
  Job jobs[kMost];
  int count;
};

// launch(batch, last) for as many batches as `count` jobs need; once with no job where there is none.
template <typename Job, typename Launch>
void in_batches(const Job* jobs, int count, const Launch& launch) {
  Batch<Job> batch;
  int done = 0;
  do {
    batch.count = std::min(count - done, Batch<Job>::kMost);
    std::copy_n(jobs + done, batch.count, batch.jobs);
    done += batch.count;
    launch(batch, done == count);
  } while (done < count);
}

}  // namespace edge_moe::cuda
