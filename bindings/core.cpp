// The extension module edge_moe._core: assembled of the bind_*.cpp that stand beside what they bind.
#include <nanobind/nanobind.h>

#include "../devices/python/gil.h"

namespace nb = nanobind;

void bind_format(nb::module_& m);
void bind_kernels(nb::module_& m);
void bind_config(nb::module_& m);
void bind_engine(nb::module_& m);
void bind_residency(nb::module_& m);
void bind_system(nb::module_& m);
void bind_sampler(nb::module_& m);
void bind_rounding(nb::module_& m);

NB_MODULE(_core, m) {
  m.doc() = "The C++ core of edge_moe: packed formats, kernels, the engine.";
  bind_format(m);
  bind_kernels(m);
  bind_config(m);
  bind_engine(m);
  bind_residency(m);
  bind_system(m);
  bind_sampler(m);
  bind_rounding(m);
  register_exit_hook();
}
