// The ceilings of a GPU that decide between kernel designs, one line of JSON a measurement, times from the GPU's own clocks.
//   nvcc -std=c++17 -O3 -arch=native scripts/gpu_microbench.cu -o gpu_microbench && ./gpu_microbench [--quick]
//
//   copy_bandwidth        bytes read and written per second by a plain 128-bit copy kernel
//   mma_bf16              flops per second of mma.sync m16n8k16 from registers, every SM busy
//   launch_latency        from one empty kernel's start to the next's, in a stream and in a CUDA graph; and launch to host
//   grid_barrier          all SMs meeting: this library's flags in memory, and cooperative groups' grid.sync
//   cluster_barrier       blocks of a cluster meeting (compute capability 9.0 or newer)
//   shared_exchange       a block's threads writing a value, meeting, and reading a neighbour warp's
//   cluster_exchange      the same between blocks of a cluster, through distributed shared memory
#include <cooperative_groups.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/common/launch.cuh"
#include "../csrc/common/ptx.cuh"

namespace cg = cooperative_groups;
using namespace pyops;

namespace {

int rounds = 20;  // timings of each; the median counts

// Seconds of `work` on the GPU: the median over rounds, after one that is thrown away.
template <class Work>
double seconds(Work&& work) {
  cudaEvent_t start, stop;
  check_cuda(cudaEventCreate(&start), "cudaEventCreate");
  check_cuda(cudaEventCreate(&stop), "cudaEventCreate");
  std::vector<float> times;
  for (int i = 0; i <= rounds; ++i) {
    float milliseconds = 0;
    check_cuda(cudaEventRecord(start), "cudaEventRecord");
    work();
    check_cuda(cudaEventRecord(stop), "cudaEventRecord");
    check_cuda(cudaEventSynchronize(stop), "a benchmark's kernel");
    check_cuda(cudaEventElapsedTime(&milliseconds, start, stop), "cudaEventElapsedTime");
    if (i > 0) times.push_back(milliseconds);
  }
  check_cuda(cudaEventDestroy(start), "cudaEventDestroy");
  check_cuda(cudaEventDestroy(stop), "cudaEventDestroy");
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2] / 1e3;
}

void report(const char* name, double value, const char* unit, const std::string& how) {
  std::printf("{\"name\": \"%s\", \"value\": %.6g, \"unit\": \"%s\", \"how\": \"%s\"}\n", name, value, unit, how.c_str());
  std::fflush(stdout);
}

void* allocate(size_t bytes) {
  void* pointer = nullptr;
  check_cuda(cudaMalloc(&pointer, bytes), "cudaMalloc");
  check_cuda(cudaMemset(pointer, 0, bytes), "cudaMemset");
  return pointer;
}

// --------------------------------------------------------------------------------------------------------- bandwidth, flops

__global__ void copy_kernel(const uint4* from, uint4* to, size_t count) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count; i += static_cast<size_t>(gridDim.x) * blockDim.x)
    to[i] = from[i];
}

void copy_bandwidth(const cudaDeviceProp& gpu) {
  const size_t bytes = std::min<size_t>(size_t{1} << 30, gpu.totalGlobalMem / 8) / 16 * 16;
  auto *from = static_cast<uint4*>(allocate(bytes)), *to = static_cast<uint4*>(allocate(bytes));
  const int blocks = gpu.multiProcessorCount * 8;
  const double time = seconds([&] { copy_kernel<<<blocks, 512>>>(from, to, bytes / 16); });
  report("copy_bandwidth", 2.0 * bytes / time / 1e9, "GB/s", "read and written, " + std::to_string(bytes >> 20) + " MiB each way");
  check_cuda(cudaFree(from), "cudaFree");
  check_cuda(cudaFree(to), "cudaFree");
}

constexpr int kChains = 8;  // independent accumulators a warp: enough to hide an mma's latency

__global__ void mma_kernel(int steps, float* sink) {
  float sum[kChains][4] = {};
  const uint32_t a = threadIdx.x, b = threadIdx.x + 1;  // small denormal pairs: data does not matter to the rate
  for (int step = 0; step < steps; ++step)
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) ptx::mma_m16n8k16(bf16{}, sum[chain], a, b, a, b, a, b);
  float total = 0;
  for (int chain = 0; chain < kChains; ++chain) total += sum[chain][0] + sum[chain][3];
  if (total == 1.2345f) *sink = total;  // never, which the compiler does not know
}

void mma_bf16(const cudaDeviceProp& gpu, float* sink) {
  constexpr int kSteps = 2000, kThreads = 256, kBlocksPerSm = 4;
  const int blocks = gpu.multiProcessorCount * kBlocksPerSm;
  const double time = seconds([&] { mma_kernel<<<blocks, kThreads>>>(kSteps, sink); });
  const double flops = 2.0 * 16 * 8 * 16 * kChains * kSteps * (kThreads / 32) * blocks;
  report("mma_bf16", flops / time / 1e12, "TFLOP/s", "mma.sync m16n8k16 from registers, near-zero operands");
}

// ------------------------------------------------------------------------------------------------------------------ launches

__global__ void empty_kernel() {}

void launch_latency() {
  constexpr int kLaunches = 1000;
  auto burst = [] {
    for (int i = 0; i < kLaunches; ++i) empty_kernel<<<1, 32>>>();
  };
  report("launch_stream", seconds(burst) / kLaunches * 1e6, "us", "between empty kernels launched one after another");

  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  for (int i = 0; i < kLaunches; ++i) empty_kernel<<<1, 32, 0, stream>>>();
  check_cuda(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  const double in_graph = seconds([&] { check_cuda(cudaGraphLaunch(executable, nullptr), "cudaGraphLaunch"); }) / kLaunches;
  report("launch_graph", in_graph * 1e6, "us", "between empty kernels of one CUDA graph");
  check_cuda(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
  check_cuda(cudaGraphDestroy(graph), "cudaGraphDestroy");
  check_cuda(cudaStreamDestroy(stream), "cudaStreamDestroy");

  const double round_trip = seconds([] {
    for (int i = 0; i < 50; ++i) {
      empty_kernel<<<1, 32>>>();
      check_cuda(cudaDeviceSynchronize(), "an empty kernel");
    }
  });
  report("launch_and_wait", round_trip / 50 * 1e6, "us", "an empty kernel, and the host waiting for it");
}

// ------------------------------------------------------------------------------------------------------------------ barriers

// As csrc/rnn's grid kernels do it: a flag a block, raised after __syncthreads; a warp waits for all of them.
__global__ void flag_barriers(unsigned* flags, int count) {
  for (int epoch = 1; epoch <= count; ++epoch) {
    __syncthreads();
    if (threadIdx.x == 0) ptx::store_release(flags + blockIdx.x, epoch);
    if (threadIdx.x < 32)
      for (unsigned block = threadIdx.x; block < gridDim.x; block += 32) ptx::wait_at_least(flags + block, epoch);
    __syncthreads();
  }
}

__global__ void grid_syncs(unsigned*, int count) {
  for (int i = 0; i < count; ++i) cg::this_grid().sync();
}

void grid_barrier(const cudaDeviceProp& gpu) {
  constexpr int kBarriers = 1000, kThreads = 256;
  auto* flags = static_cast<unsigned*>(allocate(sizeof(unsigned) * gpu.multiProcessorCount));
  auto measure = [&](const char* name, void (*kernel)(unsigned*, int), const char* how) {
    auto cooperative = [&](int count) {
      void* arguments[] = {&flags, &count};
      check_cuda(cudaMemsetAsync(flags, 0, sizeof(unsigned) * gpu.multiProcessorCount), "cudaMemsetAsync");
      check_cuda(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(gpu.multiProcessorCount), dim3(kThreads),
                                             arguments, 0, nullptr),
                 name);
    };
    const double none = seconds([&] { cooperative(0); }), many = seconds([&] { cooperative(kBarriers); });
    report(name, (many - none) / kBarriers * 1e6, "us", std::to_string(gpu.multiProcessorCount) + " blocks of 256 threads, " + how);
  };
  measure("grid_barrier_flags", flag_barriers, "a flag a block");
  measure("grid_barrier_sync", grid_syncs, "cooperative groups' grid.sync");
  check_cuda(cudaFree(flags), "cudaFree");
}

// Clocks of `count` rounds, measured on the SM by block 0: what a design pays per step once it is running.
__global__ void shared_exchanges(long long* clocks, int count, float* sink) {
  __shared__ float slots[2][1024];
  float value = threadIdx.x;
  const int neighbour = (threadIdx.x + 32) % blockDim.x;
  __syncthreads();
  const long long start = clock64();
  for (int i = 0; i < count; ++i) {
    slots[i % 2][threadIdx.x] = value;
    __syncthreads();
    value = slots[i % 2][neighbour] + 1.f;
  }
  if (threadIdx.x == 0) *clocks = clock64() - start;
  if (value == 1.2345f) *sink = value;
}

void shared_exchange(long long* clocks, float* sink) {
  constexpr int kCount = 10000;
  for (int threads : {64, 128, 256, 512, 1024}) {
    shared_exchanges<<<1, threads>>>(clocks, kCount, sink);
    long long found = 0;
    check_cuda(cudaMemcpy(&found, clocks, sizeof(found), cudaMemcpyDeviceToHost), "shared_exchange");
    report(("shared_exchange_" + std::to_string(threads)).c_str(), static_cast<double>(found) / kCount, "clocks",
           "write, __syncthreads, read another warp's; " + std::to_string(threads) + " threads");
  }
}

// `exchange` 0: only the barrier; 1: each thread writes into the next block's shared memory before it and reads its own after it.
__global__ void cluster_rounds(long long* clocks, int count, int exchange, float* sink) {
#if __CUDA_ARCH__ >= 900
  __shared__ float slots[2][256];
  cg::cluster_group cluster = cg::this_cluster();
  float* const next = cluster.map_shared_rank(&slots[0][0], (cluster.block_rank() + 1) % cluster.num_blocks());
  float value = threadIdx.x;
  cluster.sync();
  const long long start = clock64();
  for (int i = 0; i < count; ++i) {
    if (exchange) next[i % 2 * 256 + threadIdx.x] = value;
    cluster.sync();
    if (exchange) value = slots[i % 2][threadIdx.x] + 1.f;
  }
  if (cluster.block_rank() == 0 && threadIdx.x == 0) *clocks = clock64() - start;
  if (value == 1.2345f) *sink = value;
  cluster.sync();  // nobody leaves while a neighbour may still write into it
#endif
}

void cluster_barrier_and_exchange(const cudaDeviceProp& gpu, long long* clocks, float* sink) {
  if (gpu.major < 9) {
    std::fprintf(stderr, "cluster barrier: not on compute capability %d.%d\n", gpu.major, gpu.minor);
    return;
  }
  constexpr int kCount = 5000;
  check_cuda(cudaFuncSetAttribute(cluster_rounds, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute");
  for (int size : {2, 4, 8, 16}) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(size), attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(static_cast<unsigned>(size)), launch.blockDim = dim3(256);
    launch.attrs = &attribute, launch.numAttrs = 1;
    for (int exchange : {0, 1}) {
      const cudaError_t status = cudaLaunchKernelEx(&launch, cluster_rounds, clocks, static_cast<int>(kCount), exchange, sink);
      if (status != cudaSuccess) {  // 16 is beyond what every GPU of this kind allows
        std::fprintf(stderr, "cluster of %d: %s\n", size, cudaGetErrorString(cudaGetLastError()));
        continue;
      }
      long long found = 0;
      check_cuda(cudaMemcpy(&found, clocks, sizeof(found), cudaMemcpyDeviceToHost), "cluster_rounds");
      const std::string name = (exchange ? "cluster_exchange_" : "cluster_barrier_") + std::to_string(size);
      report(name.c_str(), static_cast<double>(found) / kCount, "clocks",
             std::to_string(size) + (exchange ? " blocks: write to the next one's shared memory, meet, read" : " blocks meet"));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--quick") == 0) rounds = 5;
    else return std::fprintf(stderr, "usage: %s [--quick]\n", argv[0]), 2;
  }
  try {
    cudaDeviceProp gpu{};
    check_cuda(cudaGetDeviceProperties(&gpu, 0), "cudaGetDeviceProperties");
    auto* sink = static_cast<float*>(allocate(sizeof(float)));
    auto* clocks = static_cast<long long*>(allocate(sizeof(long long)));
    copy_bandwidth(gpu);
    mma_bf16(gpu, sink);
    launch_latency();
    grid_barrier(gpu);
    shared_exchange(clocks, sink);
    cluster_barrier_and_exchange(gpu, clocks, sink);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_microbench: %s\n", error.what());
    return 1;
  }
  return 0;
}
