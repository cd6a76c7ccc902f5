// A fork-join pool: run(count, task) calls task(i, thread) for every i, the caller working too.
//
// Threads claim one index at a time from a single 64-bit ticket (epoch, count, next index), so a slow thread takes
// fewer, and a thread that has not woken yet is not waited for: the caller returns when every index is done, not when
// every thread has reported. Idle threads spin for some microseconds (the next run of a token comes sooner than a futex
// wakes) and then sleep, using no processor time between tokens. With more threads than processors they should sleep at
// once: a spinning thread would hold a processor that another one needs.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "interrupt.h"

namespace edge_moe {

// Start `count` threads of work(number). If the system refuses one, calls stop(), which has to end and join the earlier
// ones, and throws SystemError.
void start_threads(std::vector<std::thread>& threads, int count, const std::function<void(int)>& work,
                   const std::function<void()>& stop);

class ThreadPool {
 public:
  explicit ThreadPool(int threads, bool spin = true);  // throws SystemError if the system refuses a thread
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;

  int threads() const { return int(workers_.size()) + 1; }

  // run() asks `interrupt` from now on and skips the remaining tasks once it is stopped; null: none are skipped. Users
  // of run()'s results have to call check() first.
  void set_interrupt(Interrupt* interrupt) { interrupt_ = interrupt; }

  // Run task(index, thread) for index in [0, count); returns when all are done. Tasks must not throw.
  template <typename Task>
  void run(int count, Task&& task) {
    if (count == 1 || workers_.empty()) {
      for (int i = 0; i < count && !(interrupt_ && interrupt_->asked()); ++i) task(i, 0);
      return;
    }
    start(
        count, [](void* t, int i, int thread) { (*static_cast<std::remove_reference_t<Task>*>(t))(i, thread); }, &task);
  }

 private:
  using Call = void (*)(void*, int, int);
  void stop();
  void start(int count, Call call, void* task);
  bool claim_and_run(int thread);
  void work(int thread);

  int spins_;  // spins of an idle thread before it sleeps
  std::vector<std::thread> workers_;
  Interrupt* interrupt_ = nullptr;
  std::atomic<uint64_t> ticket_{0};  // epoch << 40 | count << 20 | next
  std::atomic<int> done_{0};
  std::atomic<uint32_t> signal_{0};  // changes with every run; sleepers wait on it
  std::atomic<bool> stop_{false};
  Call call_ = nullptr;
  void* task_ = nullptr;
};

}  // namespace edge_moe
