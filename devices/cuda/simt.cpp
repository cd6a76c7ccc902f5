// The stand-in for a GPU of simt.h, on fibers that are reused between launches: ucontext starts a fiber, and longjmp
// switches fibers without a system call (with ucontext alone, a model takes over four times as long).
#undef _FORTIFY_SOURCE  // its longjmp refuses other stacks
#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace edge_moe::cuda::simt {

Index thread, block, block_size, grid_size;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr unsigned kWarp = 32;

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  std::unique_ptr<uint8_t[]> stack;  // null if it was never started
  jmp_buf at;
  State state;
  uint64_t given;
};

std::vector<Fiber> fibers(1024);  // one per thread of a block
unsigned count;                   // threads of the block
std::vector<uint8_t> shared;
jmp_buf scheduler;
unsigned running;
const std::function<void()>* body;

void give_way(State state) {
  fibers[running].state = state;
  if (!_setjmp(fibers[running].at)) _longjmp(scheduler, 1);
}

void run_fiber() {
  for (;;) {
    (*body)();
    give_way(State::kDone);
  }
}

// Releases the threads that wait at a barrier that all others have reached; false if there are none. As on a GPU, a
// thread that has ended does not block the block's barrier, but one that skips its warp's barrier is an error.
bool release() {
  bool any = false;
  for (unsigned first = 0; first < count; first += kWarp) {
    const unsigned end = first + kWarp < count ? first + kWarp : count;
    unsigned waiting = 0;
    for (unsigned i = first; i < end; ++i) waiting += fibers[i].state == State::kAtWarp;
    if (waiting != end - first) continue;
    for (unsigned i = first; i < end; ++i) fibers[i].state = State::kReady;
    any = true;
  }
  if (any) return true;
  for (unsigned i = 0; i < count; ++i)
    if (fibers[i].state == State::kAtWarp) return false;
  for (unsigned i = 0; i < count; ++i)
    if (fibers[i].state == State::kAtBlock) fibers[i].state = State::kReady, any = true;
  return any;
}

void go_on(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.stack) _longjmp(fiber.at, 1);
  static ucontext_t context, unused;
  fiber.stack = std::make_unique_for_overwrite<uint8_t[]>(kStack);
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  swapcontext(&unused, &context);
}

// In every second block the last thread runs first, so that a missing barrier between two threads shows in one order.
void run_block() {
  static bool backwards = false;
  backwards = !backwards;
  for (unsigned i = 0; i < count; ++i) fibers[i].state = State::kReady;
  do {
    for (unsigned i = 0; i < count; ++i) {
      running = backwards ? count - 1 - i : i;
      if (fibers[running].state != State::kReady) continue;
      thread.x = running;
      go_on(fibers[running]);
    }
  } while (release());
  for (unsigned i = 0; i < count; ++i)
    if (fibers[i].state != State::kDone) {
      std::fprintf(stderr, "threads of a warp wait at different barriers\n");
      std::abort();
    }
}

}  // namespace

uint8_t* dynamic_shared() { return shared.data(); }
void barrier_of_block() { give_way(State::kAtBlock); }
void barrier_of_warp() { give_way(State::kAtWarp); }

uint64_t exchange(uint64_t value, int lane) {
  fibers[running].given = value;
  barrier_of_warp();
  const uint64_t taken = fibers[running / kWarp * kWarp + unsigned(lane)].given;
  barrier_of_warp();
  return taken;
}

void launch(Index grid, Index threads, size_t shared_bytes, const std::function<void()>& of_each) {
  count = threads.x;
  shared.assign(shared_bytes, 0xcd);  // shared memory starts undefined
  block_size = threads, grid_size = grid;
  body = &of_each;
  for (block.z = 0; block.z < grid.z; ++block.z)
    for (block.y = 0; block.y < grid.y; ++block.y)
      for (block.x = 0; block.x < grid.x; ++block.x) run_block();
}

}  // namespace edge_moe::cuda::simt
