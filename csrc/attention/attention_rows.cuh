// Where attention's GPU kernels find the rows of a problem, and what its scores are made of.
//
//   Sequences   heads of query, key, value [B, H, N, D] of any strides, a span of rows and columns each; scores by ScoreOptions
//   Windows     heads of the windows of a map [B, H, W, 3C] in raster order, shifted; tokens beyond the map are qkv_bias; scores by
//               relative position and region, cosines or not
//
// A kernel is a template over which of the two it reads: both have at(problem), query, key, value, output, lse, visible and score.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "attention_mma.cuh"
#include "window_attention.h"

namespace pyops::attention {

// Heads of which `width` elements (8, 2 or 1) may be read or written at once, at any multiple of as many in a row.
struct Layout {
  Heads heads;
  int width;
};

inline Layout layout_of(const Heads& heads, int64_t D) {
  for (const int width : {8, 2})
    if (reinterpret_cast<uintptr_t>(heads.data) % (2 * width) == 0 && (heads.batch | heads.head | heads.row | D) % width == 0)
      return {heads, width};
  return {heads, 1};
}

struct Token {
  int pixel;  // row * W + column of the map, -1 beyond it
  int code;   // place in the table's order, and the region in the upper 16 bits
};

// Rows of a problem: row i begins at data + i * step, or with tokens, a window's, at data + pixel * step.
template <class T>
struct Rows {
  T* data;
  int64_t step;
  int width;  // Layout's
  const Token* tokens;
  const float* beyond;  // what stands in the rows beyond the map; null: zeros

  // Null beyond the map.
  PYOPS_DEVICE T* at(int row) const {
    if (!tokens) return data + row * step;
    return tokens[row].pixel < 0 ? nullptr : data + tokens[row].pixel * step;
  }
};

template <class T>
union Piece {  // 16 bytes of a row
  uint4 raw;
  T element[8];
};

// Elements 8 * chunk .. of a row that has D, zeros behind.
template <class T>
PYOPS_DEVICE uint4 load_piece(const Rows<T>& rows, int row, int chunk, int D) {
  const int column = 8 * chunk;
  Piece<T> piece;
  piece.raw = uint4{0, 0, 0, 0};
  if (column >= D) return piece.raw;
  const T* const from = rows.at(row);
  if (!from) {
    if (!rows.beyond) return piece.raw;
    PYOPS_UNROLL
    for (int v = 0; v < 8; ++v)
      if (column + v < D) piece.element[v] = from_float<T>(rows.beyond[column + v]);
    return piece.raw;
  }
  if (rows.width == 8) return *reinterpret_cast<const uint4*>(from + column);
  PYOPS_UNROLL
  for (int v = 0; v < 8; ++v)
    if (column + v < D) piece.element[v] = from[column + v];
  return piece.raw;
}

template <class T>
PYOPS_DEVICE void store_piece(const Rows<T>& rows, int row, int chunk, int D, const uint4& raw) {
  const int column = 8 * chunk;
  T* const to = rows.at(row);
  if (column >= D || !to) return;
  Piece<T> piece;
  piece.raw = raw;
  if (rows.width == 8) {
    *reinterpret_cast<uint4*>(to + column) = raw;
    return;
  }
  if (rows.width == 2) {
    PYOPS_UNROLL
    for (int v = 0; v < 8; v += 2)
      if (column + v < D) *reinterpret_cast<uint32_t*>(to + column + v) = (&raw.x)[v / 2];
    return;
  }
  PYOPS_UNROLL
  for (int v = 0; v < 8; ++v)
    if (column + v < D) to[column + v] = piece.element[v];
}

// Rows [0, count) of D elements into a tile, zeros behind them up to `padded` rows. Wait for asynchronous copies, then for all threads.
template <class T>
PYOPS_DEVICE void stage_rows(const Tile& tile, const Rows<T>& rows, int count, int padded, int D, int thread, int threads) {
  const int row_step = threads / tile.chunks, chunk_step = threads % tile.chunks;
  for (int row = thread / tile.chunks, chunk = thread % tile.chunks; row < padded;) {
    uint4* const to = tile.at(row, chunk);
    const T* const from = row < count && rows.width == 8 ? rows.at(row) : nullptr;
    if (from) ptx::cp_async_16_or_zero(to, from + (8 * chunk < D ? 8 * chunk : 0), 8 * chunk < D);
    else *to = row < count ? load_piece(rows, row, chunk, D) : uint4{0, 0, 0, 0};
    row += row_step, chunk += chunk_step;
    if (chunk >= tile.chunks) chunk -= tile.chunks, ++row;
  }
}

// A warp's 16 rows from row0 on, as the left operand of steps of 16 columns; rows from `count` on are zeros.
template <class T, int kSteps>
PYOPS_DEVICE void load_left(const Rows<T>& rows, int row0, int count, int D, uint32_t (&a)[kSteps][4]) {
  static_assert(kSteps % 2 == 0, "quads read 32 columns at once");
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  PYOPS_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane / 4 + 8 * half;
    uint4 pieces[kSteps / 2];
    PYOPS_UNROLL
    for (int u = 0; u < kSteps / 2; ++u) pieces[u] = row < count ? load_piece(rows, row, 4 * u + lane % 4, D) : uint4{0, 0, 0, 0};
    PYOPS_UNROLL
    for (int u = 0; u < kSteps / 2; ++u) {
      uint32_t w[4] = {pieces[u].x, pieces[u].y, pieces[u].z, pieces[u].w};
      quad_transpose(w);
      PYOPS_UNROLL
      for (int b = 0; b < 4; ++b) a[2 * u + b / 2][half + b % 2 * 2] = w[b];
    }
  }
}

// 16 rows of sums, those of each half times its factor, to rows row0 .. count - 1.
template <class T, int kTiles>
PYOPS_DEVICE void store_sums(const Rows<T>& rows, int row0, int count, int D, const float (&sum)[kTiles][4], const float (&factor)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  PYOPS_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + lane / 4 + 8 * half;
    PYOPS_UNROLL
    for (int u = 0; u < kTiles / 4; ++u) {
      if (32 * u >= D) break;
      uint32_t w[4];
      PYOPS_UNROLL
      for (int b = 0; b < 4; ++b) w[b] = pack<T>(sum[4 * u + b][2 * half] * factor[half], sum[4 * u + b][2 * half + 1] * factor[half]);
      quad_transpose(w);
      if (row < count) store_piece(rows, row, 4 * u + lane % 4, D, uint4{w[0], w[1], w[2], w[3]});
    }
  }
}

// --------------------------------------------------------------------------------------------------------------- sequences

struct SequenceAt {
  int sequence, head, n, m;  // rows and columns
  int batch, row, column;    // where they begin
  HeadScores scores;
};

struct Sequences {
  Layout q, k, v, y;
  float* sums;           // lse [B, H, N]
  const int32_t* spans;  // [S, 4] or null: S = B, all rows and columns
  ScoreOptions options;
  int B, S, H, group, N, M, D;  // group: query heads a key head

  static constexpr bool kWindows = false;

  PYOPS_DEVICE SequenceAt at(int problem) const {
    SequenceAt found{problem / H, problem % H, N, M, 0, 0, 0, {}};
    found.batch = B > 1 ? found.sequence : 0;
    if (spans) {  // clamped into the tensors
      const int32_t* const span = spans + int64_t{4} * found.sequence;
      const auto clamped = [](int value, int most) { return value < 0 ? 0 : value > most ? most : value; };
      found.row = clamped(span[0], N), found.n = clamped(span[1], N - found.row);
      found.column = clamped(span[2], M), found.m = clamped(span[3], M - found.column);
    }
    found.n = found.n < options.bias_rows ? found.n : options.bias_rows;
    found.m = found.m < options.bias_columns ? found.m : options.bias_columns;
    found.scores = head_scores(options, found.sequence, found.head, found.n, found.m);
    return found;
  }
  template <class T>
  PYOPS_DEVICE Rows<T> rows(const Layout& of, int batch, int head, int row) const {
    const Heads& h = of.heads;
    return {static_cast<T*>(h.data) + batch * h.batch + head * h.head + row * h.row, h.row, of.width, nullptr, nullptr};
  }
  template <class T>
  PYOPS_DEVICE Rows<T> query(const SequenceAt& a) const {
    return rows<T>(q, a.batch, a.head, a.row);
  }
  template <class T>
  PYOPS_DEVICE Rows<T> key(const SequenceAt& a) const {
    return rows<T>(k, a.batch, a.head / group, a.column);
  }
  template <class T>
  PYOPS_DEVICE Rows<T> value(const SequenceAt& a) const {
    return rows<T>(v, a.batch, a.head / group, a.column);
  }
  template <class T>
  PYOPS_DEVICE Rows<T> output(const SequenceAt& a) const {
    return rows<T>(y, a.batch, a.head, a.row);
  }
  PYOPS_DEVICE float* lse(const SequenceAt& a) const { return sums + (static_cast<int64_t>(a.batch) * H + a.head) * N + a.row; }

  // The keys [first, last) that query i sees.
  PYOPS_DEVICE void visible(const SequenceAt& a, int i, int& first, int& last) const {
    attention::visible(options, a.scores, i, first, last);
  }
  // Products of queries i and keys j become scores, -inf where a mask says so; others unseen are the caller's business.
  template <bool kTransposed = false>
  PYOPS_DEVICE void score(const SequenceAt& a, const int (&i)[2], const int (&j)[2], float (&x)[4]) const {
    scale_and_cap(options, x);
    add_biases<kTransposed>(options, a.scores, i, j, x);
  }
};

// For sizes that fit 32 bits.
inline Sequences sequences_of(const Attention& p) {
  Sequences s{};
  s.q = layout_of(p.query, p.D), s.k = layout_of(p.key, p.D), s.v = layout_of(p.value, p.D), s.y = layout_of(p.output, p.D);
  s.sums = p.lse, s.spans = p.spans;
  s.B = static_cast<int>(p.B), s.S = static_cast<int>(p.S), s.H = static_cast<int>(p.H), s.group = static_cast<int>(p.H / p.G);
  s.N = static_cast<int>(p.N), s.M = static_cast<int>(p.M), s.D = static_cast<int>(p.D);
  ScoreOptions& o = s.options;
  o.scale = p.scale, o.softcap = p.softcap;
  o.left = static_cast<int>(std::min<int64_t>(p.left, kFar)), o.right = static_cast<int>(std::min<int64_t>(p.right, kFar));
  o.bias = p.bias.data, o.bias_type = p.bias.dtype;
  const int bytes = o.bias_type == BiasType::f32 ? 4 : o.bias_type == BiasType::boolean ? 1 : 2;
  for (int d = 0; d < 4; ++d) o.bias_step[d] = p.bias.strides[d] * bytes;
  const auto extent = [&](int d) {
    const int64_t size = p.bias.sizes[d];
    return o.bias_type == BiasType::none || size == 1 ? INT32_MAX : static_cast<int>(std::min<int64_t>(size, INT32_MAX));
  };
  o.bias_rows = extent(2), o.bias_columns = extent(3);
  o.slopes = p.slopes, o.slopes_stride = p.slopes_sequence;
  return s;
}

// ----------------------------------------------------------------------------------------------------------------- windows

// What a block keeps in shared memory of a window's head: tokens [padded], units, table [entries]. One pointer, to spare registers.
struct WindowShared {
  float* units;  // with cosines: 1 / |query| [padded], then of the keys
};

struct WindowAt {
  int sequence, head, n, m;  // the window's number; tokens
  int image;
  WindowShared shared;
};

struct Windows {
  const void* qkv;           // [B, H, W, 3C]
  const float* qkv_bias;     // [3C] or null
  const float* table;        // [entries, heads] or null
  const float* logit_scale;  // [heads] or null: `scale` then
  void* y;                   // [B, H, W, C]
  float* sums;               // lse [windows, heads, N]
  float scale;
  int H, W, heads, D;            // the map, and C = heads * D
  int wh, ww, shift_h, shift_w;  // a window
  int down, across;              // windows of an image
  int tokens, entries;           // wh * ww, (2 * wh - 1) * (2 * ww - 1)
  int width;                     // Layout's

  static constexpr bool kWindows = true;
  static constexpr float kMasked = -100.f;  // between regions

  PYOPS_HOST_DEVICE int padded() const { return round_up(tokens, 16); }
  PYOPS_HOST_DEVICE int shared_bytes() const {  // a multiple of 16
    return static_cast<int>(round_up(padded() * (sizeof(Token) + (logit_scale ? 8 : 0)) + entries * sizeof(float), size_t{16}));
  }
  PYOPS_DEVICE WindowShared shared_at(unsigned char* memory) const { return {reinterpret_cast<float*>(memory + padded() * sizeof(Token))}; }
  PYOPS_DEVICE Token* tokens_of(const WindowAt& a) const { return reinterpret_cast<Token*>(a.shared.units) - padded(); }
  // The head's column, zeros without a table.
  PYOPS_DEVICE float* table_of(const WindowAt& a) const { return a.shared.units + (logit_scale ? 2 * padded() : 0); }
  PYOPS_DEVICE WindowAt at(int problem, const WindowShared& shared) const {
    const int window = problem / heads;
    return {window, problem % heads, tokens, tokens, window / (down * across), shared};
  }
  // A token in the rolled map at `place` of a side of `whole`: 0, 1 or 2.
  PYOPS_DEVICE static int region(int place, int whole, int side, int shift) {
    return shift == 0 ? 0 : (place >= whole - side ? 1 : 0) + (place >= whole - shift ? 1 : 0);
  }
  // Fills the shared memory but for `units`; wait for all threads then.
  PYOPS_DEVICE void prepare(const WindowAt& a, int thread, int threads) const {
    const int number = a.sequence % (down * across), top = number / across * wh, left = number % across * ww;
    for (int i = thread; i < padded(); i += threads) {
      const int token = i < tokens ? i : 0;  // those beyond have a place in the table as well
      const int row = top + token / ww, column = left + token % ww;
      const int y0 = row + shift_h, x0 = column + shift_w;
      const int at_y = y0 >= down * wh ? y0 - down * wh : y0, at_x = x0 >= across * ww ? x0 - across * ww : x0;
      const int apart = region(row, down * wh, wh, shift_h) * 3 + region(column, across * ww, ww, shift_w);
      const bool inside = i < tokens && at_y < H && at_x < W;
      tokens_of(a)[i] = {inside ? at_y * W + at_x : -1, token / ww * (2 * ww - 1) + token % ww + (apart << 16)};
    }
    for (int i = thread; i < entries; i += threads) table_of(a)[i] = table ? table[i * heads + a.head] : 0.f;
  }
  // Part 0, 1, 2 of a tensor [B, H, W, parts * C].
  template <class T>
  PYOPS_DEVICE Rows<T> rows(const void* data, const WindowAt& a, int part, int parts, const float* beyond) const {
    const int64_t C = static_cast<int64_t>(heads) * D, step = parts * C, from = part * C + a.head * D;
    T* const own = static_cast<T*>(const_cast<void*>(data)) + a.image * (static_cast<int64_t>(H) * W) * step + from;
    return {own, step, width, tokens_of(a), beyond ? beyond + from : nullptr};
  }
  template <class T>
  PYOPS_DEVICE Rows<T> query(const WindowAt& a) const {
    return rows<T>(qkv, a, 0, 3, qkv_bias);
  }
  template <class T>
  PYOPS_DEVICE Rows<T> key(const WindowAt& a) const {
    return rows<T>(qkv, a, 1, 3, qkv_bias);
  }
  template <class T>
  PYOPS_DEVICE Rows<T> value(const WindowAt& a) const {
    return rows<T>(qkv, a, 2, 3, qkv_bias);
  }
  template <class T>
  PYOPS_DEVICE Rows<T> output(const WindowAt& a) const {
    return rows<T>(y, a, 0, 1, nullptr);
  }
  PYOPS_DEVICE float* lse(const WindowAt& a) const { return sums + (static_cast<int64_t>(a.sequence) * heads + a.head) * tokens; }

  PYOPS_DEVICE void visible(const WindowAt& a, int, int& first, int& last) const { first = 0, last = a.m; }
  // Products of queries i and keys j, all below padded(), become scores. The products of cosines are of rows as they are: what makes
  // them units comes here, in float.
  template <bool kTransposed = false>
  PYOPS_DEVICE void score(const WindowAt& a, const int (&i)[2], const int (&j)[2], float (&x)[4]) const {
    const int origin = (wh - 1) * (2 * ww - 1) + ww - 1;
    const float factor = logit_scale ? logit_scale[a.head] : scale;
    PYOPS_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int row = i[kTransposed ? e % 2 : e / 2], column = j[kTransposed ? e / 2 : e % 2];
      const int own = tokens_of(a)[row].code, other = tokens_of(a)[column].code;
      float value = x[e] * factor;
      if (logit_scale) value *= a.shared.units[row] * a.shared.units[padded() + column];
      const int entry = (own & 0xffff) - (other & 0xffff) + origin;
      x[e] = value + table_of(a)[entry] + (own >> 16 != other >> 16 ? kMasked : 0.f);
    }
  }
};

// For sizes that fit 32 bits.
inline Windows windows_of(const WindowAttention& p) {
  Windows w{};
  w.qkv = p.qkv, w.qkv_bias = p.qkv_bias, w.table = p.table, w.logit_scale = p.logit_scale;
  w.y = p.output, w.sums = p.lse, w.scale = p.scale;
  w.H = static_cast<int>(p.H), w.W = static_cast<int>(p.W), w.heads = static_cast<int>(p.heads), w.D = static_cast<int>(p.D);
  w.wh = static_cast<int>(p.wh), w.ww = static_cast<int>(p.ww);
  w.shift_h = static_cast<int>(p.shift_h), w.shift_w = static_cast<int>(p.shift_w);
  w.down = static_cast<int>(p.rows), w.across = static_cast<int>(p.columns);
  w.tokens = static_cast<int>(p.tokens()), w.entries = static_cast<int>(p.entries());
  w.width = 8;
  for (const void* data : {p.qkv, static_cast<const void*>(p.output), p.grad, static_cast<const void*>(p.grad_qkv)})
    w.width = std::min(w.width, layout_of({const_cast<void*>(data), 0, 0, 0}, p.D).width);
  return w;
}

}  // namespace pyops::attention
