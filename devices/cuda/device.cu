// The functions of device.h, implemented by the CUDA runtime.
#include <cuda_runtime.h>

#include "device.h"

namespace edge_moe::cuda {

namespace {

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // resets the error, so that the next call does not report it again
  const std::string what = std::string(doing) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation) throw NoMemory(what);
  throw std::runtime_error(what + "; run edge-moe doctor, or use device cpu");
}

cudaStream_t of(Stream stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

const char* build() { return "cuda"; }

Properties open() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();
    const std::string needed = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    throw std::runtime_error("no NVIDIA GPU can be used: " +
                             (error == cudaErrorInsufficientDriver
                                  ? "there is no driver, or one older than CUDA " + needed
                              : error == cudaSuccess ? "the driver finds none"
                                                     : std::string(cudaGetErrorString(error))) +
                             "; run edge-moe doctor, or use device cpu");
  }
  check(cudaSetDevice(0), "use the GPU");
  cudaDeviceProp found;
  check(cudaGetDeviceProperties(&found, 0), "ask for the GPU's properties");
  Properties p;
  p.name = found.name;
  p.major = found.major, p.minor = found.minor;
  p.multiprocessors = found.multiProcessorCount;
  p.integrated = found.integrated != 0;
  check(cudaMemGetInfo(&p.free, &p.memory), "start the GPU");
  return p;
}

int multiprocessors() {
  static const int found = [] {  // asked for by every launch of a product
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0), "ask for the GPU's properties");
    return count;
  }();
  return found;
}

void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (bytes) check(cudaMalloc(&memory, bytes), "allocate memory of the GPU");
  return memory;
}

void* allocate_shared(size_t bytes) {
  void* memory = nullptr;
  if (bytes)
    check(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable), "allocate pinned memory");
  void* on_device = memory;
  if (bytes) check(cudaHostGetDevicePointer(&on_device, memory, 0), "map pinned memory");
  if (on_device == memory) return memory;
  cudaFreeHost(memory);
  throw std::runtime_error("this GPU does not address pinned memory as the processor does; use device cpu");
}

void release(void* memory) noexcept { cudaFree(memory); }
void release_shared(void* memory) noexcept { cudaFreeHost(memory); }

Stream make_stream() {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "make a stream");
  return stream;
}

void release_stream(Stream stream) noexcept { cudaStreamDestroy(of(stream)); }

void copy(void* to, const void* from, size_t bytes, Stream stream) {
  if (bytes) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, of(stream)), "copy");
}

void wait(Stream stream) { check(cudaStreamSynchronize(of(stream)), "compute"); }

Event make_event() {
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "make an event");
  return event;
}

void release_event(Event event) noexcept { cudaEventDestroy(static_cast<cudaEvent_t>(event)); }
void record(Event event, Stream stream) {
  check(cudaEventRecord(static_cast<cudaEvent_t>(event), of(stream)), "record an event");
}
void wait_for(Event event) { check(cudaEventSynchronize(static_cast<cudaEvent_t>(event)), "compute"); }

void begin_capture(Stream stream) {
  check(cudaStreamBeginCapture(of(stream), cudaStreamCaptureModeThreadLocal), "begin a graph");
}

Graph end_capture(Stream stream) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(of(stream), &graph), "end a graph");
  cudaGraphExec_t made = nullptr;
  const cudaError_t error = cudaGraphInstantiateWithFlags(&made, graph, 0);
  cudaGraphDestroy(graph);
  check(error, "make a graph");
  return made;
}

void launch(Graph graph, Stream stream) {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), of(stream)), "launch a graph");
}

void release_graph(Graph graph) noexcept { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)); }

void check_launch() { check(cudaGetLastError(), "launch a kernel"); }

}  // namespace edge_moe::cuda
