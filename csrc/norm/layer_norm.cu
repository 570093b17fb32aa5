// LayerNorm over each position's channels, and its gradient.
//
//   z = (input - mean) * rstd,  output = z * weight + bias
//   output = rstd * (h - mean(h) - z * mean(h*z)), h = grad * weight;  sums [2, C] = sums over positions of grad*z and grad
//
//   input, grad, output: rows [N, P, C] or planes [N, C, P];  weight, bias [C];  statistics [N*P, 2] = mean, rstd
//
// rows: a group of 1 to 32 lanes has a position, each lane 4 or 8 vectors of 16 bytes (or single channels) in registers; longer
// rows are read again, from L1, for each of the steps. planes: a lane has a position and eight warps a channel in eight each, read again
// from L1. The variance is the mean of squared deviations in both. The gradient leaves mean and rstd of each position to
// layer_norm_sums.cu. Floors: input read once, output written once; in the gradient input and grad twice, output once. Source: Ba et al.,
// "Layer Normalization", 2016.
#include "norms.cuh"

namespace pyops::norm {
namespace {

constexpr int kFewHeld = 4, kMostHeld = 8;  // vectors of a row in a lane's registers: up to 1024 and 2048 channels of 16 bits

struct LayerNormParams {
  const void *input, *grad;
  const float *weight, *bias;
  void* output;
  float2* statistics;
  int64_t positions, C, P;
  int lanes;  // of a group
  float eps, share;
};

// V floats of a vector, or as many of `otherwise`.
template <int V>
PYOPS_DEVICE void load_floats(const float* from, int64_t at, float otherwise, float (&to)[V]) {
  constexpr int kPart = V % 4 == 0 ? 4 : 1;
  PYOPS_UNROLL
  for (int v = 0; v < V; v += kPart) {
    float part[kPart];
    if (from) conv::load_channels<float, kPart>(from + at + v, part);
    PYOPS_UNROLL
    for (int i = 0; i < kPart; ++i) to[v + i] = from ? part[i] : otherwise;
  }
}

// ------------------------------------------------------------------------------------------------------------------- rows

// A lane's vectors of a row: lane, lane + lanes, ...; in registers, or with kHeld == 0 read each time.
template <class T, int V, int kHeld>
struct Row {
  using Raw = typename conv::RawOf<V * sizeof(T)>::type;
  const T* at;
  Raw raw[kHeld ? kHeld : 1];

  PYOPS_DEVICE void load(const void* image, int64_t offset, int lane, int lanes, int count) {
    at = static_cast<const T*>(image) + offset;
    PYOPS_UNROLL
    for (int i = 0; i < kHeld; ++i) raw[i] = lane + i * lanes < count ? reinterpret_cast<const Raw*>(at)[lane + i * lanes] : Raw{};
  }
  PYOPS_DEVICE void get(int i, int vector, float (&to)[V]) const {
    if constexpr (kHeld == 0) return conv::load_channels<T, V>(at + static_cast<int64_t>(vector) * V, to);
    T values[V];
    __builtin_memcpy(values, &raw[i], sizeof(Raw));
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) to[v] = to_float(values[v]);
  }
};

// f(which of the lane's, which of the row's) for each of a lane's vectors.
template <int kHeld, class F>
PYOPS_DEVICE void each_vector(int lane, int lanes, int count, F&& f) {
  if constexpr (kHeld == 0) {
    for (int vector = lane; vector < count; vector += lanes) f(0, vector);
  } else {
    PYOPS_UNROLL
    for (int i = 0; i < kHeld; ++i)
      if (lane + i * lanes < count) f(i, lane + i * lanes);
  }
}

// Where a lane stands; groups past the last position do as the last one does and write nothing.
struct RowPlace {
  int lane, count;  // vectors of a row
  int64_t position;
  bool active;
};
template <int V>
PYOPS_DEVICE RowPlace row_place(const LayerNormParams& p) {
  const int thread = static_cast<int>(threadIdx.x), groups = kNormThreads / p.lanes;
  const int64_t position = static_cast<int64_t>(blockIdx.x) * groups + thread / p.lanes;
  const bool active = position < p.positions;
  return {thread % p.lanes, static_cast<int>(p.C / V), active ? position : p.positions - 1, active};
}

template <class T, int V, int kHeld>
PYOPS_DEVICE float2 row_statistics(const LayerNormParams& p, const RowPlace& me, const Row<T, V, kHeld>& x) {
  Sum sum, squares;
  each_vector<kHeld>(me.lane, p.lanes, me.count, [&](int i, int vector) {
    float values[V], part = 0.f;
    x.get(i, vector, values);
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) part += values[v];
    sum.add(part);
  });
  const float mean = group_sum(sum.total, p.lanes) * p.share;
  each_vector<kHeld>(me.lane, p.lanes, me.count, [&](int i, int vector) {
    float values[V], part = 0.f;
    x.get(i, vector, values);
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) part += (values[v] - mean) * (values[v] - mean);
    squares.add(part);
  });
  return {mean, 1.f / sqrtf(group_sum(squares.total, p.lanes) * p.share + p.eps)};
}

template <class T, int V, int kHeld>
PYOPS_KERNEL(kNormThreads)
layer_norm_rows(LayerNormParams p) {
  const RowPlace me = row_place<V>(p);
  Row<T, V, kHeld> x;
  x.load(p.input, me.position * p.C, me.lane, p.lanes, me.count);
  const float2 statistics = row_statistics<T, V, kHeld>(p, me, x);
  if (!me.active) return;
  T* const to = static_cast<T*>(p.output) + me.position * p.C;
  each_vector<kHeld>(me.lane, p.lanes, me.count, [&](int i, int vector) {
    const int64_t at = static_cast<int64_t>(vector) * V;
    float values[V], weight[V], bias[V];
    x.get(i, vector, values);
    load_floats<V>(p.weight, at, 1.f, weight);
    load_floats<V>(p.bias, at, 0.f, bias);
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) values[v] = (values[v] - statistics.x) * statistics.y * weight[v] + bias[v];
    conv::store_channels<T, V>(to + at, values);
  });
}

template <class T, int V, int kHeld>
PYOPS_KERNEL(kNormThreads)
layer_norm_rows_gradient(LayerNormParams p) {
  const RowPlace me = row_place<V>(p);
  Row<T, V, kHeld> x, g;
  x.load(p.input, me.position * p.C, me.lane, p.lanes, me.count);
  g.load(p.grad, me.position * p.C, me.lane, p.lanes, p.output ? me.count : 0);
  const float2 statistics = row_statistics<T, V, kHeld>(p, me, x);
  if (me.active && me.lane == 0) p.statistics[me.position] = statistics;
  if (!p.output) return;
  // h and z of a vector
  const auto terms = [&](int i, int vector, float (&h)[V], float (&z)[V]) {
    float weight[V];
    x.get(i, vector, z), g.get(i, vector, h);
    load_floats<V>(p.weight, static_cast<int64_t>(vector) * V, 1.f, weight);
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) z[v] = (z[v] - statistics.x) * statistics.y, h[v] *= weight[v];
  };
  Sum sum, products;
  each_vector<kHeld>(me.lane, p.lanes, me.count, [&](int i, int vector) {
    float h[V], z[V], part = 0.f, product = 0.f;
    terms(i, vector, h, z);
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) part += h[v], product += h[v] * z[v];
    sum.add(part), products.add(product);
  });
  const float mean = group_sum(sum.total, p.lanes) * p.share, slope = group_sum(products.total, p.lanes) * p.share;
  if (!me.active) return;
  T* const to = static_cast<T*>(p.output) + me.position * p.C;
  each_vector<kHeld>(me.lane, p.lanes, me.count, [&](int i, int vector) {
    float h[V], z[V];
    terms(i, vector, h, z);
    PYOPS_UNROLL
    for (int v = 0; v < V; ++v) h[v] = statistics.y * (h[v] - mean - z[v] * slope);
    conv::store_channels<T, V>(to + static_cast<int64_t>(vector) * V, h);
  });
}

// ----------------------------------------------------------------------------------------------------------------- planes

// The sum over the block's warps of each lane's value. Every thread calls it.
PYOPS_DEVICE float over_warps(float* room, float value) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  room[thread] = value;
  __syncthreads();
  float total = 0.f;
  PYOPS_UNROLL
  for (int w = 0; w < kNormWarps; ++w) total += room[w * kWarpSize + lane];
  __syncthreads();
  return total;
}

// The sum of term(channel) over a warp's channels, four at a time.
template <class F>
PYOPS_DEVICE float plane_sum(const LayerNormParams& p, F&& term) {
  constexpr int B = 4;
  Sum sum;
  for (int64_t channel = static_cast<int>(threadIdx.x) / kWarpSize; channel < p.C; channel += B * kNormWarps) {
    float part[B];
    PYOPS_UNROLL
    for (int b = 0; b < B; ++b) part[b] = channel + b * kNormWarps < p.C ? term(channel + b * kNormWarps) : 0.f;
    sum.add((part[0] + part[1]) + (part[2] + part[3]));
  }
  return sum.total;
}

// Where a lane's position is: of its first channel's element. Lanes past the last position do as the last one does.
struct PlanePlace {
  int64_t position, at;
  bool active;
};
PYOPS_DEVICE PlanePlace plane_place(const LayerNormParams& p) {
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize;
  PlanePlace me{position < p.positions ? position : p.positions - 1, 0, position < p.positions};
  const int image = static_cast<int>(me.position) / static_cast<int>(p.P), within = static_cast<int>(me.position) % static_cast<int>(p.P);
  me.at = image * p.C * p.P + within;
  return me;
}

template <class T>
PYOPS_DEVICE float2 plane_statistics(const LayerNormParams& p, const T* x, float* room) {
  const float mean = over_warps(room, plane_sum(p, [&](int64_t c) { return to_float(x[c * p.P]); })) * p.share;
  const float squares = plane_sum(p, [&](int64_t c) {
    const float apart = to_float(x[c * p.P]) - mean;
    return apart * apart;
  });
  return {mean, 1.f / sqrtf(over_warps(room, squares) * p.share + p.eps)};
}

template <class T>
PYOPS_KERNEL(kNormThreads)
layer_norm_planes(LayerNormParams p) {
  float* const room = reinterpret_cast<float*>(dynamic_shared());
  const PlanePlace me = plane_place(p);
  const T* const x = static_cast<const T*>(p.input) + me.at;
  const float2 statistics = plane_statistics(p, x, room);
  if (!me.active) return;
  T* const to = static_cast<T*>(p.output) + me.at;
  for (int64_t c = static_cast<int>(threadIdx.x) / kWarpSize; c < p.C; c += kNormWarps) {
    const float z = (to_float(x[c * p.P]) - statistics.x) * statistics.y;
    to[c * p.P] = from_float<T>(z * (p.weight ? p.weight[c] : 1.f) + (p.bias ? p.bias[c] : 0.f));
  }
}

template <class T>
PYOPS_KERNEL(kNormThreads)
layer_norm_planes_gradient(LayerNormParams p) {
  float* const room = reinterpret_cast<float*>(dynamic_shared());
  const PlanePlace me = plane_place(p);
  const T *const x = static_cast<const T*>(p.input) + me.at, *const g = static_cast<const T*>(p.grad) + me.at;
  const float2 statistics = plane_statistics(p, x, room);
  if (me.active && threadIdx.x < kWarpSize) p.statistics[me.position] = statistics;
  if (!p.output) return;
  const auto h_of = [&](int64_t c) { return to_float(g[c * p.P]) * (p.weight ? p.weight[c] : 1.f); };
  const auto z_of = [&](int64_t c) { return (to_float(x[c * p.P]) - statistics.x) * statistics.y; };
  const float mean = over_warps(room, plane_sum(p, h_of)) * p.share;
  const float slope = over_warps(room, plane_sum(p, [&](int64_t c) { return h_of(c) * z_of(c); })) * p.share;
  if (!me.active) return;
  T* const to = static_cast<T*>(p.output) + me.at;
  for (int64_t c = static_cast<int>(threadIdx.x) / kWarpSize; c < p.C; c += kNormWarps)
    to[c * p.P] = from_float<T>(statistics.y * (h_of(c) - mean - z_of(c) * slope));
}

// ---------------------------------------------------------------------------------------------------------------- launches

// Channels in a vector of 16 bytes where rows and vectors of floats can be read so; else one.
int row_vector(const LayerNorm& p) {
  const int element = p.dtype == DType::f32 ? 4 : 2, V = 16 / element;
  return vectors_fit(p.C, V, element, {p.input, p.grad, p.output}) && vectors_fit(p.C, 4, 4, {p.weight, p.bias}) ? V : 1;
}

LayerNormParams layer_norm_params(const LayerNorm& p) {
  check_positions(p.N * p.P);
  if (p.C > INT32_MAX / 2) throw std::runtime_error("LayerNorm on a GPU: up to 2^30 channels");
  LayerNormParams params{p.input, p.grad, p.weight, p.bias, p.output, nullptr, p.N * p.P, p.C, p.P, 1, p.eps};
  params.share = 1.f / static_cast<float>(p.C);
  // as few lanes as have kFewHeld vectors each: the fewer, the less of a row's end is idle
  for (const int64_t vectors = p.C / row_vector(p); params.lanes < kWarpSize && params.lanes * kFewHeld < vectors;) params.lanes *= 2;
  return params;
}

LaunchShape rows_shape(const LayerNormParams& p) {
  return {dim3(static_cast<unsigned>(ceil_div(p.positions, int64_t{kNormThreads / p.lanes}))), kNormThreads, 0};
}
LaunchShape planes_shape(const LayerNormParams& p) {
  return {dim3(static_cast<unsigned>(ceil_div(p.positions, int64_t{kWarpSize}))), kNormThreads, kNormThreads * sizeof(float)};
}

// Calls f(a value of the storage type, V, vectors held) with numbers as constants.
template <class F>
void with_rows(const LayerNorm& p, F&& f) {
  with_type(p.dtype, [&](auto type) {
    constexpr int V = 16 / sizeof(type);
    const int vector = row_vector(p);
    const int64_t each = ceil_div(p.C / vector, int64_t{kWarpSize});  // of a lane, where a group is a warp
    const auto with_held = [&](auto v) {
      if (each <= kFewHeld) f(type, v, std::integral_constant<int, kFewHeld>{});
      else if (each <= kMostHeld) f(type, v, std::integral_constant<int, kMostHeld>{});
      else f(type, v, std::integral_constant<int, 0>{});
    };
    if (vector == V) with_held(std::integral_constant<int, V>{});
    else with_held(std::integral_constant<int, 1>{});
  });
}

}  // namespace

void layer_norm(const LayerNorm& p, cudaStream_t stream) {
  if (p.N * p.P * p.C == 0) return;
  const LayerNormParams params = layer_norm_params(p);
  if (p.rows) {
    with_rows(p, [&](auto type, auto v, auto held) {
      launch("layer_norm_rows", layer_norm_rows<decltype(type), decltype(v)::value, decltype(held)::value>, rows_shape(params), stream,
             params);
    });
  } else {
    with_type(p.dtype,
              [&](auto type) { launch("layer_norm_planes", layer_norm_planes<decltype(type)>, planes_shape(params), stream, params); });
  }
}

size_t layer_norm_gradient_workspace(const LayerNorm& p) {
  if (p.N * p.P * p.C == 0) return 0;
  return sizeof(float2) * static_cast<size_t>(p.N * p.P) + layer_norm_sums_workspace(p);
}

void layer_norm_gradient(const LayerNorm& p, void* workspace, cudaStream_t stream) {
  if (p.C == 0) return;
  if (p.N * p.P == 0) return zero_async(p.sums, sizeof(float) * 2 * p.C, stream);
  LayerNormParams params = layer_norm_params(p);
  params.statistics = static_cast<float2*>(workspace);
  if (p.rows) {
    with_rows(p, [&](auto type, auto v, auto held) {
      launch("layer_norm_rows_gradient", layer_norm_rows_gradient<decltype(type), decltype(v)::value, decltype(held)::value>,
             rows_shape(params), stream, params);
    });
  } else {
    with_type(p.dtype, [&](auto type) {
      launch("layer_norm_planes_gradient", layer_norm_planes_gradient<decltype(type)>, planes_shape(params), stream, params);
    });
  }
  layer_norm_sums(p, params.statistics, reinterpret_cast<float*>(params.statistics + p.N * p.P), stream);
}

#define PYOPS_ROW_KERNELS(kernel, T, V) \
  PYOPS_KERNEL_INFO(kernel, T, V, 4), PYOPS_KERNEL_INFO(kernel, T, V, 8), PYOPS_KERNEL_INFO(kernel, T, V, 0)
#define PYOPS_LAYER_NORM_KERNELS(T, V)                                                                                                   \
  PYOPS_ROW_KERNELS(layer_norm_rows, T, V), PYOPS_ROW_KERNELS(layer_norm_rows, T, 1), PYOPS_ROW_KERNELS(layer_norm_rows_gradient, T, V), \
      PYOPS_ROW_KERNELS(layer_norm_rows_gradient, T, 1), PYOPS_KERNEL_INFO(layer_norm_planes, T),                                        \
      PYOPS_KERNEL_INFO(layer_norm_planes_gradient, T)

static const KernelRegistration registration({
    PYOPS_LAYER_NORM_KERNELS(float, 4),
    PYOPS_LAYER_NORM_KERNELS(bf16, 8),
    PYOPS_LAYER_NORM_KERNELS(f16, 8),
});

}  // namespace pyops::norm
