// GEMM over packed panels: C[M, N] = A[M, K] * W[N, K]^T, for any M, in one K order.
//
// Each output is one chain of dot products over k = 0, P, 2P, ... in one SIMD lane, whatever M, the
// tile, the thread or the blocking: a partial sum that leaves a register comes back unchanged. So
// row i of a batch equals the same row alone, bit for bit. Weights are read from memory once per
// call: columns outside, row blocks inside, K blocks small enough to stay in L2.
#pragma once
#include <algorithm>
#include <cstddef>

#include "sinterlm/simd.h"
#include "sinterlm/threads.h"

namespace sl {

constexpr int kPanelCols = 64;
constexpr int kRowBlock = 96;      // rows per pass over a panel: their operands stay in L2
constexpr int kDepthBlock = 1024;  // k per pass: 64 columns of bf16 are 128 KB, in L2

// c[R][ldc] (+)= a[R][lda] * one step of C * 16 columns per P k. `b` advances by k_step per P k and
// col_step per 16 columns (elements), so that weights, K pages and V pages are all panels.
template <class E, int R, int C>
inline void tile(const E* a, int64_t lda, const E* b, int64_t k_step, int64_t col_step, int K,
                 float* c, int64_t ldc, bool accumulate) {
  Vec sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) sum[r][j] = accumulate ? load(c + r * ldc + j * kLanes) : zero();
#ifdef SL_MUTATE_K_UNROLL  // a second chain at M = 1: the invariance tests must notice
  Vec odd[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) odd[r][j] = zero();
#endif
  for (int k = 0; k < K; k += kPair<E>) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      const Panel<E> w = Panel<E>::load(b + j * col_step);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#ifdef SL_MUTATE_K_UNROLL
        if (R == 1 && (k / kPair<E>) % 2) {
          odd[r][j] = Panel<E>::mac(odd[r][j], a + r * lda + k, w);
          continue;
        }
#endif
        sum[r][j] = Panel<E>::mac(sum[r][j], a + r * lda + k, w);
      }
    }
    b += k_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
#ifdef SL_MUTATE_K_UNROLL
      sum[r][j] = add(sum[r][j], odd[r][j]);
#endif
      store(c + r * ldc + j * kLanes, sum[r][j]);
    }
}

// Picks tile<R, C> for run-time rows in [1, kTileRows] and columns in [1, kTileCols] x 16.
template <class E, int R = kTileRows, int C = kTileCols>
inline void tile_any(int rows, int cols, const E* a, int64_t lda, const E* b, int64_t k_step,
                     int64_t col_step, int K, float* c, int64_t ldc, bool accumulate) {
  if constexpr (C > 1) {
    if (cols < C) {
      tile_any<E, R, C - 1>(rows, cols, a, lda, b, k_step, col_step, K, c, ldc, accumulate);
      return;
    }
  }
  if constexpr (R > 1) {
    if (rows < R) {
      tile_any<E, R - 1, C>(rows, cols, a, lda, b, k_step, col_step, K, c, ldc, accumulate);
      return;
    }
  }
  tile<E, R, C>(a, lda, b, k_step, col_step, K, c, ldc, accumulate);
}

// All rows and `cols` x 16 columns of one panel, rows cut into near-equal tiles (9 = 5 + 4).
template <class E>
inline void panel_rows(int rows, int cols, const E* a, int64_t lda, const E* b, int64_t k_step,
                       int64_t col_step, int K, float* c, int64_t ldc, bool accumulate) {
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int j = 0; j < cols; j += kTileCols) {
    const int width = std::min(kTileCols, cols - j);
    for (int t = 0; t < tiles; ++t) {
      const int r0 = rows * t / tiles, r1 = rows * (t + 1) / tiles;
      tile_any<E>(r1 - r0, width, a + r0 * lda, lda, b + j * col_step, k_step, col_step, K,
                  c + r0 * ldc + j * kLanes, ldc, accumulate);
    }
  }
}

// Columns [c0, c1) (multiples of 16) of `rows` rows into c[rows][ldc], column c0 at c[0].
template <class E>
inline void columns(int rows, const E* a, int64_t lda, const E* weight, int K, int c0, int c1,
                    float* c, int64_t ldc) {
  constexpr int P = kPair<E>;
  for (int k = 0; k < K; k += kDepthBlock) {
    const int depth = std::min(kDepthBlock, K - k);
    for (int col = c0; col < c1;) {
      const int panel = col / kPanelCols, in = col % kPanelCols;
      const int end = std::min(c1, (panel + 1) * kPanelCols);
      const E* b = weight + int64_t(panel) * kPanelCols * K + int64_t(k) * kPanelCols + in * P;
      panel_rows<E>(rows, (end - col) / kLanes, a + k, lda, b, kPanelCols * P, kLanes * P, depth,
                    c + (col - c0), ldc, k > 0);
      col = end;
    }
  }
}

// Columns and rows of one item.
struct Block {
  int c0, c1, r0, r1;
};

// How one GEMM is cut into items: whole units of columns (a panel, a head) as long as every worker
// gets one, then what is left over in slices of `slice` columns, so that the last round is even
// too. Whole panels stream from memory at full speed; slices do not. Row blocks are innermost.
class Cut {
 public:
  Cut(int cols, int rows, int unit, int slice, int workers)
      : cols_(cols), rows_(rows), unit_(unit), slice_(slice) {
    const int units = (cols + unit - 1) / unit;
    whole_ = unit == slice ? units : units / workers * workers;
    if (whole_ * unit > cols) --whole_;  // a last unit that is not whole is cut
    across_ = whole_ + (cols - whole_ * unit + slice - 1) / slice;
    height_ = rows;
    while (across_ * ((rows + height_ - 1) / height_) < 4 * workers && height_ > kRowBlock / 2)
      height_ = (height_ + 1) / 2;
    down_ = (rows + height_ - 1) / height_;
  }
  int items() const { return across_ * down_; }
  Block operator[](int item) const {
    const int across = item / down_, r0 = item % down_ * height_;
    const int r1 = std::min(rows_, r0 + height_);
    if (across < whole_) return {across * unit_, (across + 1) * unit_, r0, r1};
    const int c0 = whole_ * unit_ + (across - whole_) * slice_;
    return {c0, std::min(cols_, c0 + slice_), r0, r1};
  }

 private:
  int cols_, rows_, unit_, slice_, whole_, across_, height_, down_;
};

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

// Runs fn(row, c0, c1, c) for each row of the items this worker claims; c holds that row's sums of
// columns [c0, c1) until fn returns.
template <class E, class Fn>
inline void matmul(Worker& w, const E* a, int64_t lda, int rows, const E* weight, int K, int N,
                   Fn&& fn) {
  const Cut cut(N, rows, kPanelCols, kLanes, w.count);
  float* c = static_cast<float*>(w.scratch);
  w.for_each(cut.items(), [&](int item) {
    const Block b = cut[item];
    for (int r = b.r0; r < b.r1; r += kRowBlock) {
      const int n = std::min(kRowBlock, b.r1 - r);
      columns<E>(n, a + r * lda, lda, weight, K, b.c0, b.c1, c, kPanelCols);
      for (int i = 0; i < n; ++i) fn(r + i, b.c0, b.c1, c + i * kPanelCols);
    }
  });
}

// x' = x + a W^T + bias, and the by-products the next norm needs. o_residual and down_residual.
template <class E>
void residual_matmul(Worker& w, const ResidualArgs<E>& p) {
  const auto finish = [&](int t, int c0, int c1, const float* c) {
    const int64_t row = int64_t(t) * p.Hp;
    for (int n = c0; n < c1; n += kLanes) {
      Vec v = load(c + n - c0);
      if (p.bias) v = add(v, load(p.bias + n));
      v = add(v, load(p.x + row + n));
      store(p.out.x + row + n, v);
      store_elems(p.out.xw + row + n, mul(v, load(p.norm_weight + n)));
      p.out.ssq[(row + n) / kLanes] = reduce_add(mul(v, v));
    }
  };
  matmul<E>(w, p.a, p.K, p.batch->num_tokens, p.weight, p.K, p.Hp, finish);
}

// The operands of the rows to be sampled, side by side (a phase of its own).
template <class E>
void gather_rows(Worker& w, const LmHeadArgs<E>& p) {
  w.for_each_static(p.num_rows, [&](int r) {
    std::memcpy(p.gathered + int64_t(r) * p.Hp, p.xw + int64_t(p.rows[r]) * p.Hp, sizeof(E) * p.Hp);
  });
}

// logits = (gathered W^T) * rstd; columns of padding are written too and never read.
template <class E>
void lm_head(Worker& w, const LmHeadArgs<E>& p) {
  float* rstd = static_cast<float*>(w.scratch) + kRowBlock * kPanelCols;
  for (int r = 0; r < p.num_rows; ++r) rstd[r] = row_rstd(p.ssq, p.rows[r], p.Hp, p.H, p.eps);
  matmul<E>(w, p.gathered, p.Hp, p.num_rows, p.weight, p.Hp, p.Vp,
            [&](int r, int c0, int c1, const float* c) {
              float* out = p.logits + int64_t(r) * p.Vp;
              const Vec scale = set1(rstd[r]);
              for (int n = c0; n < c1; n += kLanes) store(out + n, mul(load(c + n - c0), scale));
            });
}

}  // namespace sl
