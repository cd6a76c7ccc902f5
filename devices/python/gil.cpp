// Threads at the exit of Python; see gil.h.
#include "gil.h"

#include <atomic>
#include <chrono>
#include <thread>

namespace nb = nanobind;

static std::atomic<bool> exiting{false};
static std::thread::id exit_thread;    // the thread that runs exit hooks and finalises Python; set before `exiting`
static std::atomic<int> acquiring{0};  // threads that have seen `exiting` unset, and do not have the GIL yet

static void stop_threads() {
  exit_thread = std::this_thread::get_id();
  exiting = true;
  nb::set_leak_warnings(false);  // the waiting threads never release their objects
  PyThreadState* state = PyEval_SaveThread();
  while (acquiring) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  PyEval_RestoreThread(state);
}

void GilReleased::acquire() {
  ++acquiring;
  if (exiting && std::this_thread::get_id() != exit_thread) {
    --acquiring;
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
  PyEval_RestoreThread(state_);
  --acquiring;
}

void register_exit_hook() { nb::module_::import_("atexit").attr("register")(nb::cpp_function(stop_threads)); }
