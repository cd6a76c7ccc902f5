// A GPU as the host sees it: its memory, its streams and its graphs. Three files have these functions, and a build
// takes one of them: device.cu for CUDA, simt_device.cpp for the stand-in of simt.h, none.cpp for neither.
//
// All throw std::runtime_error with what CUDA says, and NoMemory where there is not enough.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace edge_moe::cuda {

using Stream = void*;  // cudaStream_t: what is put into one is done in its order
using Event = void*;   // cudaEvent_t
using Graph = void*;   // cudaGraphExec_t

struct NoMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Properties {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  bool integrated = false;  // its memory is the processor's
  size_t memory = 0, free = 0;
};

const char* build();    // "cuda", "simulated" or "none"
Properties open();      // begin to use the first GPU
int multiprocessors();  // of it

// Memory of the GPU alone; of both, that the processor reads and writes and kernels too, at the same address.
void* allocate(size_t bytes);
void* allocate_shared(size_t bytes);
void release(void* memory) noexcept;
void release_shared(void* memory) noexcept;

Stream make_stream();
void release_stream(Stream stream) noexcept;
void copy(void* to, const void* from, size_t bytes, Stream stream);  // between any two kinds of memory
void wait(Stream stream);                                            // until all that was put into it is done

Event make_event();
void release_event(Event event) noexcept;
void record(Event event, Stream stream);
void wait_for(Event event);  // until all is done that was in the stream when it was recorded

// What is put into the stream between these two is not done, but made a graph that can be launched as one.
void begin_capture(Stream stream);
Graph end_capture(Stream stream);
void launch(Graph graph, Stream stream);
void release_graph(Graph graph) noexcept;

void check_launch();  // throws what the last launch was refused for

}  // namespace edge_moe::cuda
