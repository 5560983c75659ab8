// GEMM over packed panels: C[M, N] = A[M, K] * W[N, K]^T, for any M, in one K order.
//
// Each output is one chain of dot products over k = 0, P, 2P, ... in one SIMD lane, whatever M, the
// tile, the thread or the blocking: a partial sum that leaves a register comes back unchanged. So
// row i of a batch equals the same row alone, bit for bit. Weights are read from memory once per
// call: columns outside, row blocks inside, K blocks small enough to stay in L2.
#pragma once
#include "sinterlm/tile_narrow.h"
#include "sinterlm/tile_weight_only.h"

namespace sl {

constexpr int kDepthBlock = 1024;  // k per pass: 64 columns of bf16 are 128 KB, in L2
static_assert(kDepthBlock % 128 == 0, "a pass ends where a group of weights does");

// Columns [c0, c1) (multiples of 16) of `rows` rows into c[rows][ldc], column c0 at c[0].
template <class F>
inline void columns(int rows, const char* a, int64_t pitch, const typename F::Weight* weight, int K,
                    int c0, int c1, float* c, int64_t ldc, void* scratch) {
  for (int k = 0; k < K; k += kDepthBlock) {
    for (int col = c0; col < c1;) {
      const int end = std::min(c1, (col / kPanelCols + 1) * kPanelCols);
      const char* panel =
          reinterpret_cast<const char*>(weight) + col / kPanelCols * F::panel_bytes(K);
      const PanelPiece piece{a,
                             pitch,
                             panel,
                             K,
                             k,
                             std::min(kDepthBlock, K - k),
                             col % kPanelCols,
                             c + (col - c0),
                             ldc,
                             F::panel_bytes(kDepthBlock)};
      multiply(F{}, rows, (end - col) / kLanes, piece, scratch);
      col = end;
    }
  }
}

// 1 / sqrt(mean(x^2) + eps) of row t from the sums its producer left, in one order.
inline float row_rstd(const float* ssq, int t, int Hp, int H, float eps) {
  const int n = Hp / kLanes;
  const float* s = ssq + int64_t(t) * n;
  Vec acc = zero();
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) acc = add(acc, load(s + i));
  float total = reduce_add(acc);
  for (; i < n; ++i) total += s[i];
  return 1.0f / __builtin_sqrtf(total / static_cast<float>(H) + eps);
}

// What an op keeps in its worker's scratch beside the sums of an item, which begin it: a float for
// each row of a step, and a piece of a panel that has to be unpacked.
constexpr int kMaxRows = 1 << 18;
constexpr size_t kSumsBytes = size_t{512} << 10, kRowFloatsBytes = kMaxRows * sizeof(float);
static_assert(kSumsBytes + kRowFloatsBytes + kPieceBytes <= kScratchBytes);
inline float* row_floats(const Worker& w) {
  return reinterpret_cast<float*>(static_cast<char*>(w.scratch) + kSumsBytes);
}
inline void* panel_scratch(const Worker& w) {
  return static_cast<char*>(w.scratch) + kScratchBytes - kPieceBytes;
}

// row_rstd of the step's rows, each worker its own: items of all panels need them.
inline const float* rstd_of_rows(const Worker& w, const float* ssq, int rows, int Hp, int H,
                                 float eps) {
  float* rstd = row_floats(w);
  for (int t = 0; t < rows; ++t) rstd[t] = row_rstd(ssq, t, Hp, H, eps);
  return rstd;
}

// Runs finish(row, c0, c1, c) for each row of the items this worker claims; c holds that row's sums
// of columns [c0, c1), whole granules, until finish returns.
template <class F, class Finish>
inline void matmul(Worker& w, const Rows<F>& a, int rows, const typename F::Weight* weight, int K,
                   int N, int granule, Finish&& finish) {
  const Cut cut(N, rows, kPanelCols, granule, *w.team);
  const auto compute = [&](int r, int n, int c0, int c1, float* c, int ld) {
    columns<F>(n, a.row(r), a.pitch, weight, K, c0, c1, c, ld, panel_scratch(w));
  };
  in_blocks(w, cut, kPanelCols, compute, finish);
}

// x and the by-products of it that the next norm needs, for the next F::kUnit columns from n of row
// t: value(n) gives 16 columns of x.
template <class F, class Value>
inline void store_stream(const Stream<F>& out, const float* norm_weight, int Hp, int t, int n,
                         Value&& value) {
  alignas(64) float xw[F::kUnit];
  const int64_t row = int64_t(t) * Hp;
  for (int i = 0; i < F::kUnit; i += kLanes) {
    const Vec v = value(n + i);
    store(out.x + row + n + i, v);
    store(xw + i, mul(v, load(norm_weight + n + i)));
    out.ssq[(row + n + i) / kLanes] = reduce_add(mul(v, v));
  }
  F::store(out.xw.row(t), Hp, n, xw);
}

// x' = x + a W^T + bias, and the by-products the next norm needs. o_residual and down_residual.
template <class F, class Next>
void residual_matmul(Worker& w, const ResidualArgs<F, Next>& p) {
  const auto finish = [&](int t, int c0, int c1, const float* c) {
    for (int n = c0; n < c1; n += Next::kUnit)
      store_stream(p.out, p.norm_weight, p.Hp, t, n, [&](int i) {
        Vec v = load(c + i - c0);
        if (p.bias) v = add(v, load(p.bias + i));
        return add(v, load(p.x + int64_t(t) * p.Hp + i));
      });
  };
  matmul<F>(w, p.a, p.batch->num_tokens, p.weight, p.K, p.Hp, Next::kUnit, finish);
}

}  // namespace sl
