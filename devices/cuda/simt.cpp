// The stand-in for a GPU of simt.h, on ucontext fibers.
#include "simt.h"

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
  ucontext_t context;
  std::unique_ptr<uint8_t[]> stack;
  State state;
  uint64_t given;
};

std::vector<Fiber> fibers;
std::vector<uint8_t> shared;
ucontext_t scheduler;
unsigned running;
const std::function<void()>* body;

void run_fiber() {
  (*body)();
  fibers[running].state = State::kDone;
  swapcontext(&fibers[running].context, &scheduler);
}

void give_way(State state) {
  fibers[running].state = state;
  swapcontext(&fibers[running].context, &scheduler);
}

// Let go whoever waits at a barrier that all others have reached; false when nobody does. A thread that has ended
// holds nobody up at the block's barrier, as on a GPU, but one that skips its warp's is a mistake.
bool release() {
  const unsigned count = unsigned(fibers.size());
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
  for (const Fiber& fiber : fibers)
    if (fiber.state == State::kAtWarp) return false;
  for (Fiber& fiber : fibers)
    if (fiber.state == State::kAtBlock) fiber.state = State::kReady, any = true;
  return any;
}

void begin(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
  fiber.state = State::kReady;
}

void run_block() {
  for (Fiber& fiber : fibers) begin(fiber);
  do {
    for (running = 0; running < fibers.size(); ++running) {
      if (fibers[running].state != State::kReady) continue;
      thread.x = running;
      swapcontext(&scheduler, &fibers[running].context);
    }
  } while (release());
  for (const Fiber& fiber : fibers)
    if (fiber.state != State::kDone) {
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
  while (fibers.size() < threads.x) fibers.push_back({{}, std::make_unique<uint8_t[]>(kStack), State::kDone, 0});
  fibers.resize(threads.x);
  shared.assign(shared_bytes, 0xcd);  // what a block finds there is of no use
  block_size = threads, grid_size = grid;
  body = &of_each;
  for (block.z = 0; block.z < grid.z; ++block.z)
    for (block.y = 0; block.y < grid.y; ++block.y)
      for (block.x = 0; block.x < grid.x; ++block.x) run_block();
}

}  // namespace edge_moe::cuda::simt
