// Releasing Python's global interpreter lock (GIL) while C++ computes.
//
// When Python exits, it terminates threads that try to take the GIL, and with C++ frames on the stack that aborts the
// process. Daemon threads may be computing then. So, once an exit hook has run, a thread that would take the GIL waits
// for the end of the process instead; the hook itself waits for threads that are about to take the GIL.
#pragma once

#include <nanobind/nanobind.h>

class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() { acquire(); }
  GilReleased(const GilReleased&) = delete;

  // Runs call() with the GIL held.
  template <typename Call>
  auto with_gil(Call&& call) {
    struct Held {
      GilReleased& of;
      explicit Held(GilReleased& of) : of(of) { of.acquire(); }
      ~Held() { of.state_ = PyEval_SaveThread(); }
    } held(*this);
    return call();
  }

 private:
  void acquire();

  PyThreadState* state_;
};

// Registers the exit hook with Python. Called once, when the module is created.
void register_exit_hook();
