// Whether a computation is still wanted: what its caller looks at between two pieces of work, and drops the rest.
//
// Asking the caller may be dear (Python's lock), so it is asked at most every kAskEvery; until then the answer is no.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <utility>

namespace edge_moe {

// A computation was given up because it was not wanted any more.
struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

class Interrupt {
 public:
  static constexpr std::chrono::milliseconds kAskEvery{50};

  // unwanted() is asked by the one thread that calls asked(); without it nothing is ever interrupted.
  explicit Interrupt(std::function<bool()> unwanted = {})
      : unwanted_(std::move(unwanted)), next_(Clock::now() + kAskEvery) {}

  // By the thread that computes, as often as it likes.
  bool asked() {
    if (!unwanted_ || stopped()) return stopped();
    const Clock::time_point now = Clock::now();
    if (now < next_) return false;
    next_ = now + kAskEvery;
    if (unwanted_()) stopped_.store(true, std::memory_order_relaxed);
    return stopped();
  }

  void check() {
    if (asked()) throw Interrupted();
  }

  // By any thread: what asked() last said.
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

 private:
  using Clock = std::chrono::steady_clock;
  std::function<bool()> unwanted_;
  Clock::time_point next_;
  std::atomic<bool> stopped_{false};
};

}  // namespace edge_moe
