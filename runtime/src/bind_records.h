// What the bindings of the engine and of residency have in common: records and trunk tensors from Python's tables, read
// faults by name, and objects whose threads a forked child does not have.
#pragma once

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../../devices/python/arrays.h"
#include "../../devices/python/encodings.h"
#include "expert_store.h"
#include "trunk.h"

// name, rows, cols, (codec, width, group), offset of each part
using TensorRow = std::tuple<std::string, int, int, EncodingTuple, std::vector<uint64_t>>;

std::vector<edge_moe::TrunkTensor> trunk_tensors(const std::vector<TensorRow>& rows);

// The records of the experts of all layers. experts: of each layer. rows: (records, 5): file, offset, bytes, checksum,
// and index of its layout, of which there are `layouts`; without these the last column is not needed.
std::vector<edge_moe::Record> make_records(const std::vector<int>& experts, ArrayIn<int64_t, 2> rows,
                                           ArrayIn<float, 1> frequency, std::optional<size_t> layouts);

edge_moe::ReadFault read_fault(const std::string& kind, int64_t after, int64_t times, uint64_t value);

// Whether a signal handler raised, or stop() returned true. Call with Python's GIL.
bool unwanted_by(const nb::object& stop);

// A T and the process it was made in. A forked child has its memory but not its threads: it can run nothing, and frees
// nothing, since that would wait for the threads.
template <typename T>
class OfProcess {
 public:
  explicit OfProcess(std::unique_ptr<T> its) : its_(std::move(its)) {}
  ~OfProcess() {
    if (process_ != getpid()) its_.release();
  }

  T* operator->() const { return &**this; }
  T& operator*() const {
    if (process_ != getpid())
      throw std::runtime_error("this engine was made in process " + std::to_string(process_) + ", of which this one, " +
                               std::to_string(getpid()) + ", is a forked child without its threads; make one here");
    return *its_;
  }

 private:
  std::unique_ptr<T> its_;
  const pid_t process_ = getpid();
};
