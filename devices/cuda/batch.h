// Jobs as kernel arguments: they are part of the launch, so nothing has to be copied before or kept until it completes.
#pragma once

#include <algorithm>

namespace edge_moe::cuda {

inline constexpr int kArguments = 3072;  // maximum bytes of the jobs of a launch; the limit for all arguments is 4096

template <typename Job>
struct Batch {
  static constexpr int kMost = kArguments / int(sizeof(Job));
  Job jobs[kMost];
  int count;
};

// Calls launch(batch, last) for as many batches as `count` jobs need; once with an empty batch if there are no jobs.
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
