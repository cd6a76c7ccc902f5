// The host's interface to a GPU: memory, streams and graphs. Three files implement it, and a build takes one of them:
// device.cu for CUDA, simt_device.cpp for the stand-in of simt.h, none.cpp for neither.
//
// All functions throw std::runtime_error with CUDA's message, and NoMemory if memory is short.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace edge_moe::cuda {

using Stream = void*;  // cudaStream_t: work in a stream is done in order
using Event = void*;   // cudaEvent_t
using Graph = void*;   // cudaGraphExec_t

struct NoMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Properties {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  bool integrated = false;  // it shares the CPU's memory
  size_t memory = 0, free = 0;
};

const char* build();    // "cuda", "simulated" or "none"
Properties open();      // starts using the first GPU
int multiprocessors();  // of this GPU

// Memory that only the GPU uses; memory that CPU and kernels can both read and write, at the same address.
void* allocate(size_t bytes);
void* allocate_shared(size_t bytes);
void release(void* memory) noexcept;
void release_shared(void* memory) noexcept;

Stream make_stream();
void release_stream(Stream stream) noexcept;
void copy(void* to, const void* from, size_t bytes, Stream stream);  // between any two kinds of memory
void wait(Stream stream);                                            // until all work in it is done

Event make_event();
void release_event(Event event) noexcept;
void record(Event event, Stream stream);
void wait_for(Event event);  // until all work that was in the stream when the event was recorded is done

// Work put into the stream between these two is not done, but captured in a graph, which can be launched as a whole.
void begin_capture(Stream stream);
Graph end_capture(Stream stream);
void launch(Graph graph, Stream stream);
void release_graph(Graph graph) noexcept;

void check_launch();  // throws if the last launch failed

}  // namespace edge_moe::cuda
