// The machine and this process for Python: the GPU, memory as the system counts it, processor cores, and checksums.
#include <nanobind/stl/string.h>

#include "../../devices/checksum.h"
#include "../../devices/cuda/device.h"
#include "../../devices/python/arrays.h"
#include "../../devices/python/gil.h"
#include "os.h"

using namespace edge_moe;

void bind_system(nb::module_& m) {
  m.def("cuda_build", &cuda::build,
        "The build's code for NVIDIA GPUs: \"cuda\", \"none\", or \"simulated\" for tests.");
  m.def(
      "cuda_gpu",
      [] {
        const cuda::Properties p = cuda::open();
        nb::dict d;
        d["name"] = p.name;
        d["compute_capability"] = std::to_string(p.major) + "." + std::to_string(p.minor);
        d["integrated"] = p.integrated;
        d["multiprocessors"] = p.multiprocessors;
        d["memory_bytes"] = p.memory;
        d["free_bytes"] = p.free;
        return d;
      },
      "Open the GPU of device cuda and return its properties, sizes in bytes. Raises RuntimeError if there is none.");
  m.def("resident_bytes", &resident_bytes, "Bytes of memory of this process now, as the system counts them.");
  m.def("peak_bytes", &peak_bytes, "The maximum of this process's memory so far (Linux VmHWM, macOS phys_footprint).");
  m.def("reset_peak_bytes", &reset_peak_bytes,
        "Restart peak_bytes() at the present memory; false if the system cannot.");
  m.def("untouched_bytes", &untouched_bytes,
        "Bytes that engines of this process have allocated or mapped but not touched: resident_bytes() may grow by\n"
        "them.");
  m.def("performance_cores", &performance_cores,
        "The number of fast cores of a processor that also has slower ones; 0 if all are alike or unknown.");
  m.def("return_freed_memory", &return_freed_memory, nb::call_guard<nb::gil_scoped_release>(),
        "Give the allocator's unused memory back to the system.");
  m.def("free_bytes", &free_bytes, "Bytes that the system could give to programs now.");
  m.def(
      "crc32c",
      [](nb::bytes data, uint32_t seed) {
        const char* bytes = data.c_str();
        const size_t count = data.size();
        GilReleased released;
        return crc32c(bytes, count, seed);
      },
      nb::arg("data"), nb::arg("seed") = 0, "CRC-32C of `data`, continued from `seed`.");
  m.def(
      "crc32c_array",
      [](ArrayIn<uint8_t, 1> data, uint32_t seed) {
        GilReleased released;
        return crc32c(data.data(), data.shape(0), seed);
      },
      nb::arg("data"), nb::arg("seed") = 0, "CRC-32C of a uint8 array, continued from `seed`.");
}
