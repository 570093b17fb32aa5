// The torch face of pooling after batch norm and activation on the CPU. Schemas, fakes and references are in pyops/ops/_pool_ops.py.
#include "conv/pool_cpu.h"
#include "conv/pool_tensors.h"

namespace pyops::conv {
namespace {

struct PoolCpuEngine {
  static void run(const Pooling& p, const Tensor&) { pool_cpu(p); }
  static void reduce(const Pooling& p, const Tensor&) { pool_reduce_cpu(p); }
  static void gradient(const Pooling& p, const Tensor&) { pool_gradient_cpu(p); }
};

}  // namespace
}  // namespace pyops::conv

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { pyops::conv::register_pool_ops<pyops::conv::PoolCpuEngine>(m); }
