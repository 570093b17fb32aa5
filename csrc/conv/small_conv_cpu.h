// CPU side of the convolution of small images: the entry point, and the kernels, compiled per instruction set.
#pragma once
#include "../common/parallel.h"
#include "small_conv.h"

namespace pyops::conv {

void small_conv_cpu(const SmallConv& p);
int small_conv_threads(const SmallConv& p);

namespace baseline {
void small_conv(const SmallConv& p);
}
#if defined(__x86_64__)
namespace avx2 {
void small_conv(const SmallConv& p);
}
namespace avx512 {
void small_conv(const SmallConv& p);
}
#endif

}  // namespace pyops::conv
