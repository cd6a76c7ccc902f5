// The SIGBUS handler; see map_guard.h.
//
// The handler may run in any thread at any time, so it takes no lock and what it reads is never freed: ranges are nodes
// of a list that only grows and are reused, and so are saved handlers. These form a stack, because another part of the
// program may install its handler above ours, and keep ours as the one to pass on to, before ours is put above it
// again: faulthandler does, if it is enabled after the first Runtime.
#include "map_guard.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>

namespace edge_moe {

struct GuardedRange {
  std::atomic<uintptr_t> begin{0};  // 0: not in use
  std::atomic<size_t> bytes{0};
  std::atomic<bool> lost{false};
  GuardedRange* next = nullptr;
};

namespace {

struct Handler {
  struct sigaction action;
  const Handler* before;  // the one that ours passed on to when it was below this one
};

std::atomic<GuardedRange*> ranges{nullptr};
std::atomic<const Handler*> previous{nullptr};  // null: the system's default
const Handler* spare = nullptr;                 // the last one removed
std::mutex mutex;                               // for changes to all of these
int in_use = 0;                                 // number of ranges

// Whether the processor raised it at si_addr; else a program sent it.
bool is_fault(const siginfo_t* info) { return info->si_code >= BUS_ADRALN && info->si_code <= BUS_OBJERR; }

bool give_zeros(uintptr_t address) {
  const uintptr_t page = uintptr_t(getpagesize());
  for (GuardedRange* range = ranges.load(); range; range = range->next) {
    const uintptr_t begin = range->begin.load();
    const size_t bytes = range->bytes.load();
    if (!begin || address < begin || address - begin >= bytes) continue;
    range->lost.store(true);
    const uintptr_t from = address / page * page, to = (begin + bytes + page - 1) / page * page;
    void* const at = reinterpret_cast<void*>(from);
    return mmap(at, to - from, PROT_READ, MAP_FIXED | MAP_PRIVATE | MAP_ANON, -1, 0) == at;
  }
  return false;
}

void end_by_default(int number) {
  struct sigaction action{};
  action.sa_handler = SIG_DFL;
  sigaction(number, &action, nullptr);
  raise(number);  // delivered when this handler returns
}

bool is_ours(const struct sigaction& action);

struct sigaction installed_now() {
  struct sigaction now;
  sigaction(SIGBUS, nullptr, &now);
  return now;
}

void pass_on(int number, siginfo_t* info, void* context) {
  const Handler* handler = previous.load();
  if (!handler || handler->action.sa_handler == SIG_DFL) return end_by_default(number);
  if (handler->action.sa_handler == SIG_IGN) return is_fault(info) ? end_by_default(number) : void();
  if (handler->action.sa_flags & SA_SIGINFO)
    handler->action.sa_sigaction(number, info, context);
  else
    handler->action.sa_handler(number);
  // A handler that restores the previous one, maybe ours, and raises the signal again expects the process to end.
  sigset_t pending;
  sigpending(&pending);
  if (sigismember(&pending, number) && is_ours(installed_now())) end_by_default(number);
}

void on_bus_error(int number, siginfo_t* info, void* context) {
  const int saved = errno;
  if (!is_fault(info) || !give_zeros(reinterpret_cast<uintptr_t>(info->si_addr))) pass_on(number, info, context);
  errno = saved;
}

bool is_ours(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) && action.sa_sigaction == on_bus_error;
}

// Call with the mutex held.
void install() {
  const struct sigaction now = installed_now();
  if (is_ours(now)) return;
  const Handler* below = previous.load();
  const bool same = spare && spare->before == below && spare->action.sa_flags == now.sa_flags &&
                    spare->action.sa_sigaction == now.sa_sigaction;
  previous.store(same ? spare : new Handler{now, below});
  struct sigaction ours{};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
}

// Call with the mutex held. If another handler is above ours, ours stays, so that it can pass on to ours.
void uninstall() {
  const Handler* below = previous.load();
  if (!below || !is_ours(installed_now())) return;
  sigaction(SIGBUS, &below->action, nullptr);
  previous.store(below->before);
  spare = below;
}

}  // namespace

GuardedRange* guard(uint8_t* data, size_t bytes) {
  std::lock_guard lock(mutex);
  install();
  ++in_use;
  GuardedRange* range = ranges.load();
  while (range && range->begin.load()) range = range->next;
  if (!range) {
    range = new GuardedRange;
    range->next = ranges.load();
    ranges.store(range);
  }
  range->lost.store(false);
  range->bytes.store(bytes);
  range->begin.store(reinterpret_cast<uintptr_t>(data));
  return range;
}

void unguard(GuardedRange* range) {
  std::lock_guard lock(mutex);
  range->begin.store(0);
  if (--in_use == 0) uninstall();
}

bool is_lost(const GuardedRange* range) { return range->lost.load(); }

void set_found(GuardedRange* range) { range->lost.store(false); }

void guard_maps() {
  std::lock_guard lock(mutex);
  install();
}

}  // namespace edge_moe
