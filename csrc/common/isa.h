// Which of a kernel's instances, one per instruction set, this machine runs.
#pragma once
#include "parallel.h"

// The function of that name from the namespaces that hold one of each.
#if defined(__x86_64__)
#define PYOPS_CPU_KERNEL(name) \
  (::pyops::cpu::cpu_isa()[3] == '5' ? avx512::name : ::pyops::cpu::cpu_isa()[3] == '2' ? avx2::name : baseline::name)
#else
#define PYOPS_CPU_KERNEL(name) (baseline::name)
#endif
