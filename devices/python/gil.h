// Python's lock, let go of while C++ computes.
//
// When Python ends, a thread that wants the lock back is ended where it stands, and with C++ frames on its stack that
// aborts the process. Threads of daemons may well be computing then. So, once an exit hook has run, a thread that comes
// back waits for the end of the process instead; the hook itself waits for those that are about to take the lock.
#pragma once

#include <nanobind/nanobind.h>

class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() { acquire(); }
  GilReleased(const GilReleased&) = delete;

  // call() with the lock held.
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

// Makes the exit hook known to Python. Called once, when the module is made.
void register_exit_hook();
