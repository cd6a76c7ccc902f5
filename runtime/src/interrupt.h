// Whether a computation is still wanted: its caller checks between two pieces of work, and drops the rest if it is not.
//
// Asking may be expensive (Python's GIL), so unwanted() is called at most once per kAskEvery.
// changes.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <utility>

namespace edge_moe {

// A computation was abandoned because it was no longer wanted.
struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

class Interrupt {
 public:
  static constexpr std::chrono::milliseconds kAskEvery{50};

  // Only the thread that calls asked() calls unwanted(); without unwanted() nothing is ever interrupted.
  explicit Interrupt(std::function<bool()> unwanted = {})
      : unwanted_(std::move(unwanted)), next_(Clock::now() + kAskEvery) {}

  // For the computing thread; may be called as often as it likes.
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

  // For any thread: the last answer of asked().
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }

 private:
  using Clock = std::chrono::steady_clock;
  std::function<bool()> unwanted_;
  Clock::time_point next_;
  std::atomic<bool> stopped_{false};
};

}  // namespace edge_moe
