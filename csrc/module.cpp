// The one pybind11 file. Ops are registered with torch's dispatcher by the files that implement them; this tells what was built.
#include <pybind11/pybind11.h>

#include "common/parallel.h"
#include "pyops_build_info.h"
#ifdef PYOPS_CUDA
#include <cuda_runtime_api.h>

#include "common/cuda_registry.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info = py::module_::import("json").attr("loads")(PYOPS_BUILD_INFO);
  info["cpu_isa"] = pyops::cpu::cpu_isa();
  return info;
}

#ifdef PYOPS_CUDA
// What cudaFuncGetAttributes tells of every compiled kernel whose name contains `name`.
py::list kernel_attributes(const std::string& name) {
  py::list found;
  int count = 0;
  const pyops::KernelInfo* kernels = pyops::kernel_table(&count);
  for (int i = 0; i < count; ++i) {
    if (std::string(kernels[i].name).find(name) == std::string::npos) continue;
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernels[i].function);
    if (error != cudaSuccess) throw std::runtime_error(std::string("kernel_attributes: ") + cudaGetErrorString(error));
    py::dict row;
    row["name"] = kernels[i].name;
    row["registers"] = attributes.numRegs;
    row["local_bytes"] = attributes.localSizeBytes;
    row["shared_bytes"] = attributes.sharedSizeBytes;
    row["max_threads"] = attributes.maxThreadsPerBlock;
    row["binary_version"] = attributes.binaryVersion;
    found.append(row);
  }
  return found;
}
#else
py::list kernel_attributes(const std::string&) { return py::list(); }
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyops' compiled kernels: importing it registers them with torch.ops.pyops";
  m.def("build_info", &build_info, "What was built, with what, for which architectures, and the CPU instruction set in use.");
  m.def("kernel_attributes", &kernel_attributes, py::arg("name") = "",
        "Registers, local and shared memory of the CUDA kernels whose name contains `name`. Needs a GPU; empty without CUDA kernels.");
}
