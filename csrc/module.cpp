// The one pybind11 file. Ops are registered with torch's dispatcher by the files that implement them; this tells what was built.
#include <pybind11/pybind11.h>

#include "common/parallel.h"
#include "pyops_build_info.h"
#ifdef PYOPS_CUDA
#include "common/cuda_registry.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info = py::module_::import("json").attr("loads")(PYOPS_BUILD_INFO);
  info["cpu_isa"] = pyops::cpu::cpu_isa();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyops' compiled kernels: importing it registers them with torch.ops.pyops";
  m.def("build_info", &build_info, "What was built, with what, for which architectures, and the CPU instruction set in use.");
}
