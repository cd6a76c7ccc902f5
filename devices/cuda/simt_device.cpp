// The functions of device.h for the stand-in of simt.h. Memory is the CPU's; a stream is a queue whose work is done
// when the host waits for it, so that a missing wait of the host shows.
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <utility>
#include <vector>

#include "device.h"
#include "simt.h"

namespace edge_moe::cuda {

namespace {

constexpr size_t kPage = 4096;  // alignment that unbuffered reads require

using Work = std::function<void()>;

struct Queue {
  std::deque<Work> waiting;
  std::vector<Work>* graph = nullptr;  // being captured
};

struct Mark {
  Queue* queue = nullptr;
  bool reached = true;
};

Queue* of(Stream stream) { return static_cast<Queue*>(stream); }

void do_first(Queue& queue) {
  const Work work = std::move(queue.waiting.front());
  queue.waiting.pop_front();
  work();
}

void* unset(size_t bytes) {
  if (!bytes) return nullptr;
  void* memory = std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
  if (!memory) throw NoMemory("allocate memory: out of memory");
  return std::memset(memory, 0xcd, bytes);  // the contents are undefined
}

}  // namespace

void simt::put(Stream stream, Work work) {
  if (!stream)
    work();
  else if (of(stream)->graph)
    of(stream)->graph->push_back(std::move(work));
  else
    of(stream)->waiting.push_back(std::move(work));
}

const char* build() { return "simulated"; }

Properties open() {
  Properties p;
  p.name = "simulated GPU";
  p.integrated = !std::getenv("EDGE_MOE_SIMULATE_DISCRETE");
  return p;
}

int multiprocessors() { return 1; }

void* allocate(size_t bytes) { return unset(bytes); }
void* allocate_shared(size_t bytes) { return unset(bytes); }
void release(void* memory) noexcept { std::free(memory); }
void release_shared(void* memory) noexcept { std::free(memory); }

Stream make_stream() { return new Queue; }
void release_stream(Stream stream) noexcept { delete of(stream); }
void copy(void* to, const void* from, size_t bytes, Stream stream) {
  simt::put(stream, [=] { std::memcpy(to, from, bytes); });
}
void wait(Stream stream) {
  while (stream && !of(stream)->waiting.empty()) do_first(*of(stream));
}

Event make_event() { return new Mark; }
void release_event(Event event) noexcept { delete static_cast<Mark*>(event); }
void record(Event event, Stream stream) {
  Mark* mark = static_cast<Mark*>(event);
  *mark = {of(stream), false};
  simt::put(stream, [=] { mark->reached = true; });
}
void wait_for(Event event) {
  Mark* mark = static_cast<Mark*>(event);
  while (!mark->reached && !mark->queue->waiting.empty()) do_first(*mark->queue);
}

void begin_capture(Stream stream) { of(stream)->graph = new std::vector<Work>; }
Graph end_capture(Stream stream) { return std::exchange(of(stream)->graph, nullptr); }
void launch(Graph graph, Stream stream) {
  for (const Work& work : *static_cast<std::vector<Work>*>(graph)) simt::put(stream, work);
}
void release_graph(Graph graph) noexcept { delete static_cast<std::vector<Work>*>(graph); }

void check_launch() {}

}  // namespace edge_moe::cuda
