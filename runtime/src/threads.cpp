// The fork-join pool of threads.h.
#include "threads.h"

#include <stdexcept>
#include <system_error>

#include "os.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edge_moe {

static constexpr uint64_t kIndexBits = 20;
static constexpr uint64_t kIndexMask = (uint64_t(1) << kIndexBits) - 1;
static constexpr int kSpins = 4000;  // about 50 us: longer than the gap between two runs of one token

static inline void pause_thread() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void start_threads(std::vector<std::thread>& threads, int count, const std::function<void(int)>& work,
                   const std::function<void()>& stop) {
  try {
    for (int i = 0; i < count; ++i) threads.emplace_back(work, i);
  } catch (const std::system_error& error) {
    stop();
    throw SystemError("cannot start " + std::to_string(count) + " threads", error.code().value(),
                      "lower threads, or raise what this process may use");
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::ThreadPool(int threads, bool spin) : spins_(spin ? kSpins : 0) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  start_threads(workers_, threads - 1, [this](int i) { work(i + 1); }, [this] { stop(); });
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stop_ = true;
  signal_.fetch_add(1);
  signal_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::start(int count, Call call, void* task) {
  if (count <= 0) return;
  if (uint64_t(count) > kIndexMask) throw std::invalid_argument("too many tasks in one run");
  call_ = call;
  task_ = task;
  done_.store(0, std::memory_order_relaxed);
  uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 2 * kIndexBits) + 1;
  ticket_.store(epoch << 2 * kIndexBits | uint64_t(count) << kIndexBits, std::memory_order_release);
  signal_.fetch_add(1, std::memory_order_release);
  signal_.notify_all();
  while (claim_and_run(0)) {
    if (interrupt_) interrupt_->asked();
  }
  for (int spins = 0; done_.load(std::memory_order_acquire) != count; ++spins) {
    if (spins < spins_)
      pause_thread();
    else
      std::this_thread::yield();
  }
}

// Run one index of the current run, if any is left. A claim succeeds only while the run is unfinished, so call_ and
// task_ are this run's until the index is reported as done.
bool ThreadPool::claim_and_run(int thread) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  do {
    if ((ticket & kIndexMask) >= (ticket >> kIndexBits & kIndexMask)) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel));
  if (!(interrupt_ && interrupt_->stopped())) call_(task_, int(ticket & kIndexMask), thread);
  done_.fetch_add(1, std::memory_order_release);
  return true;
}

void ThreadPool::work(int thread) {
  uint32_t seen = signal_.load(std::memory_order_acquire);
  while (!stop_.load(std::memory_order_relaxed)) {
    while (claim_and_run(thread)) {
    }
    int spins = 0;
    while (signal_.load(std::memory_order_acquire) == seen && ++spins < spins_) pause_thread();
    if (signal_.load(std::memory_order_acquire) == seen) signal_.wait(seen);
    seen = signal_.load(std::memory_order_acquire);
  }
}

}  // namespace edge_moe
