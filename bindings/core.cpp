// The extension module edge_moe._core: one bind_*.cpp a topic.
#include <nanobind/nanobind.h>

#include "gil.h"

namespace nb = nanobind;

void bind_kernels(nb::module_& m);
void bind_runtime(nb::module_& m);
void bind_compressor(nb::module_& m);

NB_MODULE(_core, m) {
  m.doc() = "The C++ core of edge_moe: packed formats, kernels, the engine.";
  bind_kernels(m);
  bind_runtime(m);
  bind_compressor(m);
  register_exit_hook();
}
