// The gradients of attention: one block has a key head of a sequence (or a head of a window) and all its queries, and makes all of it.
//
//   grad, output [n, D] of each query head, key, value [m, D]  ->  grad_query [n, D], grad_key, grad_value [m, D]; with `sums` also ds
//
// p = exp(score - lse), ds = p * (dp - delta), delta = grad . output - grad_lse, of windows, whose output is not kept, the sum of p * dp,
// for which their scores are computed twice. Queries, grad and output come by cp.async, a block of rows ahead. A block of threads goes
// on to other sequences of its key head, so that ds is summed over those that share a bias: in shared memory where it is small, else in
// the block's own copy in global memory, each element by the lane that computed it. So are the other sums, and nothing is atomic.
//
// Floors: query, key, value, grad and output read once, three gradients written once; 10 * n * m * D flops (windows: 14).
#pragma once
#include "../common/cuda_registry.h"
#include "attention_backward.cuh"

namespace pyops::attention {

template <class T, int kD, class Source>
PYOPS_KERNEL(kBackwardWarps<kD>* kWarpSize)
attention_backward(BackwardParams<Source> p) {
  constexpr bool kWindows = Source::kWindows;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = thread % kWarpSize;
  const int warp = thread / kWarpSize, warps = threads / kWarpSize, own = warp * kWarpKeys<kD>;
  const int slot = static_cast<int>(blockIdx.x), key_head = static_cast<int>(blockIdx.y);
  const int heads = p.key_heads * p.group, D = p.D;
  using Fixed = FixedRoom<kD, kWindows>;
  const auto tile = [&](int at, int chunks) { return tile_of(dynamic_shared() + at, chunks); };
  const auto floats = [&](int at) { return reinterpret_cast<float*>(dynamic_shared() + at); };
  const Tile key_tile = tile(Fixed::kKey, kChunks<kD>), value_tile = tile(p.room.value, kChunks<kD>), ds_tile = tile(p.room.ds, kRowChunks);
  const Tile query_tile = tile(Fixed::kQuery, kChunks<kD>), grad_tile = tile(Fixed::kGrad, kChunks<kD>);
  const Tile output_tile = tile(Fixed::kOutput, kChunks<kD>);
  float *const row_lse = floats(Fixed::kLse), *const row_less = floats(Fixed::kLess), *const row_delta = floats(Fixed::kDelta);
  [[maybe_unused]] float* const row_shares = floats(Fixed::kShares);
  const Blocks keys = blocks(key_tile, false), values = blocks(value_tile, false), ds_blocks = blocks(ds_tile, true);
  const Blocks query_rights = blocks(query_tile, true), query_blocks = blocks(query_tile, false);
  Blocks grad_rights = query_rights, grad_blocks = query_blocks;
  grad_rights.row += (Fixed::kGrad - Fixed::kQuery) / 16, grad_blocks.row += (Fixed::kGrad - Fixed::kQuery) / 16;
  [[maybe_unused]] float logits = 0.f;
  const auto scale = [&] {
    if constexpr (kWindows) return p.in.logit_scale ? p.in.logit_scale[key_head] : p.in.scale;
    else return p.in.options.scale;
  };
  if constexpr (kWindows)
    for (int i = thread; i < warps * 2 * kD; i += threads) floats(p.room.beyond)[i] = 0.f;
  if (p.sums_shared)
    for (int i = thread; i < kSharedSide * kSharedPitch; i += threads) floats(p.room.sums)[i] = 0.f;

  PYOPS_NO_UNROLL
  for (int sequence = slot, pass = 0; sequence < p.sequences;) {
    const int base = kWindows ? 0 : pass;  // the first of this pass' keys
    const auto place = [&](int head) {
      if constexpr (kWindows) return p.in.at(sequence * heads + head, p.in.shared_at(dynamic_shared() + p.room.own));
      else return p.in.at(sequence * heads + head);
    };
    auto a = place(key_head * p.group);
    __syncthreads();  // the sequence before has been written
    if constexpr (kWindows) {
      p.in.prepare(a, thread, threads);
      __syncthreads();
      if (p.in.logit_scale) {
        const int padded = p.in.padded();
        for (int i = thread; i < 2 * padded; i += threads) {
          const int row = i % padded;
          const Rows<T> of = i < padded ? p.in.template query<T>(a) : p.in.template key<T>(a);
          a.shared.units[i] = row < a.n ? unit_of(of, row, D) : 1.f;
        }
      }
    }
    copy_rows<T, kD>(key_tile, from_row(p.in.template key<T>(a), base), a.m - base, p.keys, D);
    copy_rows<T, kD>(value_tile, from_row(p.in.template value<T>(a), base), a.m - base, p.keys, D);
    KeySums<kD> grad_key, grad_value;
    clear<kD>(grad_key), clear<kD>(grad_value);

    const auto units_from = [&](int row) -> const float* {
      if constexpr (kWindows) return p.in.logit_scale ? a.shared.units + row : nullptr;
      else return nullptr;
    };
    const int total = ceil_div(a.n, kBlockRows) * p.group;
    [[maybe_unused]] const auto anew = [&] {
      if constexpr (kWindows) return p.in.at(fresh(sequence) * heads + key_head, a.shared);
    };
    int first = -kBlockRows;  // of the current block of rows
    float2 ahead{};           // of a row of the next: lse, and what delta is less by
    const auto copy = [&](int next) {
      ahead = {-kMinusInfinity, 0.f};  // a row that sees nothing: exp(x - inf) = 0
      if (next < total) {
        const int next_first = first + kBlockRows < a.n ? first + kBlockRows : 0, to = next % 2 * kBlockRows;
        const int count = a.n - next_first < kBlockRows ? a.n - next_first : kBlockRows;
        const auto copy_to = [&](const Tile& tile, const Rows<T>& rows) {
          copy_rows<T, kD>(from_row(tile, to), from_row(rows, next_first), count, kBlockRows, D);
        };
        int64_t at;
        if constexpr (kWindows) {
          const auto of = anew();
          copy_to(query_tile, p.in.template query<T>(of));
          copy_to(grad_tile, p.in.template rows<T>(p.out.grad, of, 0, 1, nullptr));
          at = (static_cast<int64_t>(of.sequence) * heads + key_head) * a.n + next_first;
        } else {
          const int head = next_first == 0 && next > 0 ? a.head + 1 : a.head;
          copy_to(query_tile, p.in.template rows<T>(p.in.q, a.batch, head, a.row));
          copy_to(grad_tile, p.in.template rows<T>(p.out.grad, a.batch, head, a.row));
          copy_to(output_tile, p.in.template rows<T>(p.in.y, a.batch, head, a.row));
          at = (static_cast<int64_t>(a.batch) * heads + head) * p.in.N + a.row + next_first;
        }
        if (thread < count) {
          const float lse = p.in.sums[at + thread];
          if (lse != kMinusInfinity) ahead.x = lse;
          if constexpr (!kWindows)
            if (p.out.grad_lse) ahead.y = p.out.grad_lse[at + thread];
        }
      }
      ptx::cp_async_commit();
    };
    const auto put_ahead = [&] {
      if (thread < kBlockRows) row_lse[thread] = ahead.x, row_less[thread] = ahead.y;
    };

    PYOPS_NO_UNROLL
    for (int i = -1; i < total; ++i) {
      if (i >= 0) {
        first = first + kBlockRows < a.n ? first + kBlockRows : 0;
        if constexpr (!kWindows)
          if (first == 0 && i > 0) a = place(a.head + 1);
        ptx::cp_async_wait<0>();
        __syncthreads();  // the rows have come, and the block before has been written
      }
      copy(i + 1);
      if (i < 0) {
        put_ahead();
        continue;
      }
      const int stage = i % 2 * kBlockRows;

      // each(tile, half, queries, keys, x, w, dp, what dropout keeps) for the warp's keys and 16 rows
      const auto walk = [&](int row, auto&& each) {
        const int now = fresh_lane(), g = now / 4, t = now % 4;
        PYOPS_UNROLL
        for (int tile = 0; tile < kKeyTiles<kD>; ++tile) {
          const int first_key = base + own + 16 * tile;
          KeyScores x, dp;
          keys_by_rows<T, kD>(keys, own + 16 * tile, query_rights, stage + row, x);
          keys_by_rows<T, kD>(values, own + 16 * tile, grad_rights, stage + row, dp);
          uint32_t kept = 0xffu;
          if (p.dropout.seed)
            kept = kept_scores(p.dropout, static_cast<uint64_t>(*p.dropout.seed), a.sequence, a.head, first_key, first + row);
          PYOPS_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int column = row + 8 * half + 2 * t, queries[2] = {first + column, first + column + 1};
            const int both[2] = {first_key + g, first_key + g + 8};
            float w[4] = {}, keep[4];
            if (first_key < a.m) {
              const float lse[2] = {row_lse[column], row_lse[column + 1]};
              int seen[2], unseen[2];
              p.in.visible(a, queries[0], seen[0], unseen[0]);
              p.in.visible(a, queries[1], seen[1], unseen[1]);
              if constexpr (!kWindows) scale_and_cap(p.in.options, x[half]);
              PYOPS_UNROLL
              for (int e = 0; e < 4; ++e) w[e] = x[half][e];
              if constexpr (kWindows) p.in.template score<true>(a, queries, both, w);
              else add_biases<true>(p.in.options, a.scores, queries, both, w);
              PYOPS_UNROLL
              for (int e = 0; e < 4; ++e) {
                const bool sees = both[e / 2] >= seen[e % 2] && both[e / 2] < unseen[e % 2];
                w[e] = sees ? fast_exp(w[e] - lse[e % 2]) : 0.f;
              }
            }
            PYOPS_UNROLL
            for (int e = 0; e < 4; ++e) {
              keep[e] = kept >> (4 * half + e) & 1u ? p.dropout.scale : 0.f;
              dp[half][e] *= keep[e];
            }
            each(tile, half, queries, both, x[half], w, dp[half], keep);
          }
        }
      };

      if constexpr (kWindows) {
        PYOPS_NO_UNROLL
        for (int row = 0; row < kBlockRows; row += 16) {
          float sum[2][2] = {};
          if (first + row < a.n)
            walk(row, [&](int, int half, const int (&)[2], const int (&)[2], const float (&)[4], const float (&w)[4], const float (&dp)[4],
                          const float (&)[4]) {
              PYOPS_UNROLL
              for (int e = 0; e < 4; ++e) sum[half][e % 2] += w[e] * dp[e];
            });
          const int now = fresh_lane(), g = now / 4, t = now % 4;
          PYOPS_UNROLL
          for (int e = 0; e < 4; ++e) {
            float value = sum[e / 2][e % 2];
            for (int mask = 4; mask < kWarpSize; mask *= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
            if (g == 0) row_shares[warp * kBlockRows + row + e / 2 * 8 + 2 * t + e % 2] = value;
          }
        }
        __syncthreads();
        if (thread < kBlockRows) {
          float sum = 0.f;
          for (int w = 0; w < warps; ++w) sum += row_shares[w * kBlockRows + thread];
          row_delta[thread] = sum;
        }
      } else {
        PYOPS_NO_UNROLL
        for (int row = thread / 8; row < kBlockRows; row += threads / 8) {
          float sum = 0.f;
          for (int chunk = thread % 8; chunk < kD / 8; chunk += 8) {
            Piece<T> grad, output;
            grad.raw = *grad_tile.at(stage + row, chunk), output.raw = *output_tile.at(stage + row, chunk);
            PYOPS_UNROLL
            for (int v = 0; v < 8; ++v) sum += to_float(grad.element[v]) * to_float(output.element[v]);
          }
          for (int mask = 4; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
          if (thread % 8 == 0) row_delta[row] = sum - row_less[row];
        }
      }
      __syncthreads();

      PYOPS_NO_UNROLL
      for (int row = 0; row < kBlockRows; row += 16) {
        if (first + row >= a.n) break;
        KeyOperand<kD> w_operand, ds_operand;
        int seen, unseen, ignored;
        p.in.visible(a, first + row, seen, ignored);
        p.in.visible(a, first + row + 15 < a.n ? first + row + 15 : a.n - 1, ignored, unseen);
        if (base + own >= unseen || base + own + kWarpKeys<kD> <= seen) {  // none of the warp's keys
          PYOPS_UNROLL
          for (int tile = 0; tile < kKeyTiles<kD>; ++tile) PYOPS_UNROLL
          for (int e = 0; e < 4; ++e) ds_operand[tile][e] = 0;
          put_scores<kD>(ds_tile, own, row, ds_operand);
          continue;
        }
        walk(row, [&](int tile, int half, const int (&queries)[2], const int (&both)[2], const float (&x)[4], const float (&w)[4],
                      const float (&dp)[4], const float (&keep)[4]) {
          const int column = queries[0] - first;
          const float delta[2] = {row_delta[column], row_delta[column + 1]};
          float ds[4];
          PYOPS_UNROLL
          for (int e = 0; e < 4; ++e) ds[e] = w[e] * (dp[e] - delta[e % 2]);
          if (p.sums && base + own + 16 * tile < a.m) {
            const int copy_of = kWindows || p.copies == p.slots ? slot : sequence;
            float* const sums =
                p.sums_shared ? floats(p.room.sums) : p.sums + (static_cast<int64_t>(copy_of) * heads + a.head) * p.key_rows * p.pitch;
            const int pitch = p.sums_shared ? kSharedPitch : p.pitch;
            PYOPS_UNROLL
            for (int e = 0; e < 4; e += 2) {
              float2& sum = *reinterpret_cast<float2*>(sums + static_cast<int64_t>(both[e / 2]) * pitch + queries[0]);
              sum = {sum.x + ds[e], sum.y + ds[e + 1]};
            }
          }
          if constexpr (kWindows) {
            if (p.in.logit_scale && base + own + 16 * tile < a.m) {
              PYOPS_UNROLL
              for (int e = 0; e < 4; ++e) {
                const float q = a.shared.units[queries[e % 2]], k = a.shared.units[p.in.padded() + both[e / 2]];
                logits += ds[e] * (x[e] * q * k);
                ds[e] *= unit_factor(q) * unit_factor(k);
              }
            }
          } else if (const float cap = p.in.options.softcap; cap != 0.f) {
            PYOPS_UNROLL
            for (int e = 0; e < 4; ++e) ds[e] *= 1.f - x[e] / cap * (x[e] / cap);
          }
          PYOPS_UNROLL
          for (int e = 0; e < 2; ++e) {
            w_operand[tile][2 * half + e] = pack<T>(w[2 * e] * keep[2 * e], w[2 * e + 1] * keep[2 * e + 1]);
            ds_operand[tile][2 * half + e] = pack<T>(ds[2 * e], ds[2 * e + 1]);
          }
        });
        put_scores<kD>(ds_tile, own, row, ds_operand);
        add_rows<T, kD>(w_operand, grad_blocks, stage + row, grad_value);
        add_rows<T, kD>(ds_operand, query_blocks, stage + row, grad_key);
      }
      __syncthreads();  // ds is complete, and grad has been read

      Partial partial{nullptr, base == 0, kWindows || base + p.keys >= a.m};
      if constexpr (!kWindows)
        if (p.partial) partial.sums = p.partial + ((static_cast<int64_t>(slot) * heads + a.head) * p.query_rows + first) * kD;
      query_gradients<T, kD>(ds_blocks, keys, a.m - base < p.keys ? a.m - base : p.keys, a.n - first, D, scale(), grad_tile, stage,
                             partial);
      put_ahead();
      __syncthreads();
      if (!partial.last) continue;
      const auto to = [&] {
        if constexpr (kWindows) return p.in.template rows<T>(p.out.grad_qkv, anew(), 0, 3, nullptr);
        else return p.in.template rows<T>(p.out.grad_query, a.batch, a.head, a.row);
      }();
      const int count = a.n - first < kBlockRows ? a.n - first : kBlockRows;
      write_rows<T, kD>(from_row(grad_tile, stage), from_row(to, first), count, kBlockRows, D, thread, threads, from_row(query_tile, stage),
                        units_from(first), nullptr);
    }

    ptx::cp_async_wait<0>();
    __syncthreads();  // nobody reads keys and values any more but their own warp
    const int count = a.m - base - own;
    const auto write = [&](const KeySums<kD>& sums, float factor, int part, const float* units, float* beyond) {
      const auto to = [&] {
        if constexpr (kWindows) return p.in.template rows<T>(p.out.grad_qkv, anew(), part, 3, nullptr);
        else return p.in.template rows<T>(part == 1 ? p.out.grad_key : p.out.grad_value, a.batch, key_head, a.column);
      }();
      put_sums<T, kD>(value_tile, own, sums, factor);
      __syncwarp();
      write_rows<T, kD>(from_row(value_tile, own), from_row(to, base + own), count, kWarpKeys<kD>, D, lane, kWarpSize,
                        from_row(key_tile, own), units, beyond);
      __syncwarp();
    };
    float* const beyond = kWindows ? floats(p.room.beyond) + warp * 2 * kD : nullptr;
    if (count > 0) {
      write(grad_key, scale(), 1, units_from(round_up(a.n, 16) + own), beyond);
      write(grad_value, 1.f, 2, nullptr, kWindows ? beyond + kD : nullptr);
    }
    pass += p.keys;
    if (kWindows || pass >= a.m) pass = 0, sequence += p.slots;
  }

  __syncthreads();
  if (p.sums_shared) {
    float* const to = p.sums + (static_cast<int64_t>(slot) * heads + key_head) * p.key_rows * p.pitch;
    for (int i = thread; i < p.key_rows * p.pitch; i += threads) to[i] = floats(p.room.sums)[i / p.pitch * kSharedPitch + i % p.pitch];
  }
  if constexpr (kWindows) {
    if (p.out.beyond) {
      for (int i = thread; i < 3 * D; i += threads) {  // a query beyond the map has no gradient
        float sum = 0.f;
        for (int w = 0; w < warps && i >= D; ++w) sum += floats(p.room.beyond)[(2 * w + i / D - 1) * kD + i % D];
        p.out.beyond[(static_cast<int64_t>(slot) * 3 + i / D) * heads * D + key_head * D + i % D] = sum;
      }
    }
    if (p.out.logits) {
      for (int mask = 1; mask < kWarpSize; mask *= 2) logits += __shfl_xor_sync(0xffffffffu, logits, mask);
      if (lane == 0) row_lse[warp] = logits;
      __syncthreads();
      if (thread == 0) {
        float sum = 0.f;
        for (int w = 0; w < warps; ++w) sum += row_lse[w];
        p.out.logits[static_cast<int64_t>(slot) * heads + key_head] = sum;
      }
    }
  }
}

template <class T, int kD, class Source>
void launch_backward_of(BackwardParams<Source> p, cudaStream_t stream) {
  p.room = backward_room<kD>(p);
  const DeviceLimits limits = device_limits();
  if (p.room.end > limits.shared_bytes)
    throw std::runtime_error("attention's gradient: a head needs " + std::to_string(p.room.end) + " bytes of shared memory, this GPU has " +
                             std::to_string(limits.shared_bytes));
  if (p.key_heads > 65535) throw std::runtime_error("attention's gradient on a GPU: up to 65535 key heads");
  const dim3 grid(static_cast<unsigned>(p.slots), static_cast<unsigned>(p.key_heads));
  const LaunchShape shape{grid, p.keys / kWarpKeys<kD> * kWarpSize, static_cast<size_t>(p.room.end)};
  launch("attention_backward", attention_backward<T, kD, Source>, shape, stream, p);
}

template <class Source>
void launch_backward(DType dtype, const BackwardParams<Source>& p, cudaStream_t stream) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    if (p.D <= 32) launch_backward_of<T, 32>(p, stream);
    else if (p.D <= 64) launch_backward_of<T, 64>(p, stream);
    else launch_backward_of<T, 128>(p, stream);
  };
  if (dtype == DType::bf16) run(bf16{});
  else run(f16{});
}

#define PYOPS_BACKWARD_KERNELS(T, Source)                                                                     \
  PYOPS_KERNEL_INFO(attention_backward, T, 32, Source), PYOPS_KERNEL_INFO(attention_backward, T, 64, Source), \
      PYOPS_KERNEL_INFO(attention_backward, T, 128, Source)

}  // namespace pyops::attention
