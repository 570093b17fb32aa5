// What happens to a row of products before its softmax: scale, soft cap, slopes and bias, a vector at a time, and what hides columns.
#pragma once
#include "attention_cpu.h"
#include "attention_cpu_dropout.h"
#include "attention_cpu_tile.h"

namespace pyops::attention::PYOPS_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

inline vi lane_numbers() {
  vi v;
  for (int i = 0; i < kF; ++i) v[i] = i;
  return v;
}

template <class T>
inline const T* at(const Heads& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(t.data) + batch * t.batch + head * t.head + row * t.row;
}
template <class T>
inline T* at_mutable(const Heads& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(t.data) + batch * t.batch + head * t.head + row * t.row;
}

// One row of one head. kPlain: the scale alone, and that positive.
template <bool kPlain>
struct RowScores {
  float scale, softcap, inverse_cap, slope;
  int64_t position, columns;  // of the row among its sequence's columns
  BiasType bias_type;
  bool spread;  // the bias has a value for each column
  const char* bias;

  RowScores(const Attention& p, const Sequence& q, int64_t s, int64_t head, int64_t row) : scale(p.scale), columns(q.columns) {
    if constexpr (kPlain) return;
    softcap = p.softcap, inverse_cap = softcap > 0 ? 1.f / softcap : 0.f;
    slope = p.slopes ? p.slopes[s * p.slopes_sequence + head] : 0.f;
    position = row + q.columns - q.rows;
    bias_type = p.bias.dtype, spread = p.bias.strides[3] != 0;
    const int64_t size = bias_type == BiasType::f32 ? 4 : bias_type == BiasType::boolean ? 1 : 2;
    bias = static_cast<const char*>(p.bias.data) + (s * p.bias.strides[0] + head * p.bias.strides[1] + row * p.bias.strides[2]) * size;
  }

  template <class T>
  vf bias_at(int64_t column) const {
    const T* row = reinterpret_cast<const T*>(bias);
    return spread ? load_upto(row + column, columns - column) : splat<float>(widen(row[0]));
  }
  vf hidden_at(vf x, int64_t column) const {
    const uint8_t* row = reinterpret_cast<const uint8_t*>(bias);
    if (!spread) return row[0] ? x : splat<float>(-kInfinity);
    typedef uint8_t Bytes __attribute__((vector_size(kF)));
    Bytes seen{};
    if (columns - column >= kF) __builtin_memcpy(&seen, row + column, kF);
    else __builtin_memcpy(&seen, row + column, columns - column);
    return __builtin_convertvector(seen, vi) != 0 ? x : splat<float>(-kInfinity);
  }

  // The scores of a vector of products from a column of the sequence; capped: as they are before slopes and bias.
  vf operator()(vf product, int64_t column, vf& capped) const {
    vf x = product * scale;
    if constexpr (kPlain) return x;
    if (softcap > 0) x = softcap * tanh(x * inverse_cap);
    capped = x;
    if (slope != 0) {
      const vf distance = __builtin_convertvector(lane_numbers() + static_cast<int32_t>(column - position), vf);
      x -= slope * bits<vf>(bits<vi>(distance) & INT32_MAX);
    }
    switch (bias_type) {
      case BiasType::none: return x;
      case BiasType::f32: return x + bias_at<float>(column);
      case BiasType::bf16: return x + bias_at<bf16>(column);
      case BiasType::f16: return x + bias_at<f16>(column);
      default: return hidden_at(x, column);
    }
  }
};

// -inf but for lanes low <= c + lane < high.
inline vf only(vf x, int64_t c, int64_t low, int64_t high) {
  if (c >= low && c + kF <= high) return x;
  const vi lane = lane_numbers() + static_cast<int32_t>(c);
  return (lane >= static_cast<int32_t>(low)) & (lane < static_cast<int32_t>(high)) ? x : splat<float>(-kInfinity);
}

// A run of columns of a block that begins at `first`, cut to it.
inline Columns within(Columns c, int64_t first, int64_t end) {
  return {c.begin > first ? c.begin - first : 0, (c.end < end ? c.end : end) - first};
}

inline bool is_plain(const Attention& p) { return p.scale > 0 && p.softcap == 0 && p.slopes == nullptr && p.bias.dtype == BiasType::none; }

}  // namespace
}  // namespace pyops::attention::PYOPS_ISA
