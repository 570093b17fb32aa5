// The torch face of the CPU's routing between capsules. Schemas, fakes and references are in pyops/ops/_capsule_ops.py.
#include "capsule/routing_cpu.h"
#include "capsule/routing_tensors.h"

namespace pyops::capsule {
namespace {

struct RoutingCpuEngine {
  static void run(const Routing& p, const Tensor&) { routing_cpu(p, false); }
  static void gradient(const Routing& p, const Tensor&) { routing_cpu(p, true); }
};

}  // namespace
}  // namespace pyops::capsule

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { pyops::capsule::register_capsules<pyops::capsule::RoutingCpuEngine>(m); }
