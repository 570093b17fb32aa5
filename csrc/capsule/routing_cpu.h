// CPU side of routing between capsules: the entry points, and what routing_cpu.cpp (compiled once) and the kernels (compiled per
// instruction set) share.
#pragma once
#include "../common/parallel.h"
#include "routing.h"

namespace pyops::capsule {

void routing_cpu(const Routing& p, bool gradient);

// A sample's inputs come in blocks of `lanes`, runs of blocks are chunks with sums of their own; their cut depends on sizes alone.
struct RoutingPlan {
  int threads;
  bool shared;  // all threads work on one sample at a time, else each on its own
  int64_t blocks, chunks;
  int64_t begin(int64_t chunk) const { return blocks * chunk / chunks; }
};
RoutingPlan plan_routing(const Routing& p, int64_t lanes);

namespace baseline {
void routing(const Routing& p, bool gradient);
}
#if defined(__x86_64__)
namespace avx2 {
void routing(const Routing& p, bool gradient);
}
namespace avx512 {
void routing(const Routing& p, bool gradient);
}
#endif

}  // namespace pyops::capsule
