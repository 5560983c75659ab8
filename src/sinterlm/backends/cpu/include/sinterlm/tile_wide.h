// The register tile over panels of E, and how a tile's shape is chosen for any number of rows.
#pragma once
#include <algorithm>

#include "sinterlm/formats.h"
#include "sinterlm/threads.h"

namespace sl {

constexpr int kRowBlock = 96;  // rows per pass over a panel: their operands stay in L2

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

// Calls t.run<R, C>(...) for run-time rows and columns (of 16) of at most the tile's shape.
template <class Tile, int R = Tile::Shape::kRows, int C = Tile::Shape::cols(R)>
inline void tile_any(const Tile& t, int rows, int cols, int r0, int j0) {
  if constexpr (R > 1) {
    if (rows < R) {
      tile_any<Tile, R - 1>(t, rows, cols, r0, j0);
      return;
    }
  }
  if constexpr (C > 1) {
    if (cols < C) {
      tile_any<Tile, R, C - 1>(t, rows, cols, r0, j0);
      return;
    }
  }
  t.template run<R, C>(r0, j0);
}

// All rows and `cols` x 16 columns of one panel, rows cut into near-equal tiles (9 = 5 + 4).
template <class Tile>
inline void panel_rows(int rows, int cols, const Tile& t) {
  using Shape = typename Tile::Shape;
  const int tiles = (rows + Shape::kRows - 1) / Shape::kRows, high = (rows + tiles - 1) / tiles;
  for (int j = 0; j < cols; j += Shape::cols(high)) {
    const int width = std::min(Shape::cols(high), cols - j);
    for (int i = 0; i < tiles; ++i) {
      const int r0 = rows * i / tiles, r1 = rows * (i + 1) / tiles;
      tile_any(t, r1 - r0, width, r0, j);
    }
  }
}

// Rows of E times panels of E; see tile().
template <class E>
struct WideTile {
  using Shape = TileShape<E>;
  const E* a;
  int64_t lda;
  const E* b;
  int64_t k_step, col_step;
  int K;
  float* c;
  int64_t ldc;
  bool accumulate;
  template <int R, int C>
  void run(int r0, int j0) const {
    tile<E, R, C>(a + r0 * lda, lda, b + j0 * col_step, k_step, col_step, K,
                  c + r0 * ldc + j0 * kLanes, ldc, accumulate);
  }
};

// Rows times k in [k, k + depth) of one panel, from column `col` on: what one pass computes.
struct PanelPiece {
  const char* a;  // row 0 of the operand
  int64_t pitch;  // bytes from row to row
  const char* panel;
  int K, k, depth, col;
  float* c;  // row 0, column `col`
  int64_t ldc;
};

constexpr int kWideDepth = 64;  // k that are widened together: 16 KB of a panel, in L1
constexpr size_t kWideBytes = kWideDepth * (kPanelCols + kRowBlock) * sizeof(float);

// `cols` x 16 columns of `depth` k of a bf16 panel -> fp32 [depth][64].
inline void widen_panel(const bf16* b, int depth, int cols, float* out) {
  for (int k = 0; k < depth; k += 2) {
    for (int j = 0; j < cols * kLanes; j += kLanes) {
      const Panel<bf16> w = Panel<bf16>::load(b + j * 2);
      store(out + j, w.even);
      store(out + kPanelCols + j, w.odd);
    }
    b += kPanelCols * 2;
    out += kPanelCols * 2;
  }
}

// The tile's work for bf16 where its products are computed in fp32: a few k of panel and operands
// are widened once for all rows and meet in the tile of fp32. Each output stays the same chain.
inline void multiply_widened(int rows, int cols, const WideTile<bf16>& t, void* scratch) {
  float* weights = static_cast<float*>(scratch);
  float* operands = weights + kWideDepth * kPanelCols;
  for (int k = 0; k < t.K; k += kWideDepth) {
    const int depth = std::min(kWideDepth, t.K - k);
    widen_panel(t.b + int64_t(k) * kPanelCols, depth, cols, weights);
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < depth; i += kLanes)
        store(operands + r * kWideDepth + i, load_elems(t.a + r * t.lda + k + i));
    panel_rows(rows, cols,
               WideTile<float>{operands, kWideDepth, weights, kPanelCols, kLanes, depth, t.c, t.ldc,
                               t.accumulate || k > 0});
  }
}

// Rows of E times a panel of E, `cols` x 16 columns of it.
template <class E>
inline void multiply_panel(int rows, int cols, const WideTile<E>& t, void* scratch) {
  if constexpr (kWidens && std::is_same_v<E, bf16>)
    if (rows > 1) return multiply_widened(rows, cols, t, scratch);
  panel_rows(rows, cols, t);
}

template <class E>
inline void multiply(Wide<E>, int rows, int cols, const PanelPiece& p, void* scratch) {
  constexpr int P = kPair<E>;
  const E* b = reinterpret_cast<const E*>(p.panel) + int64_t(p.k) * kPanelCols + p.col * P;
  const E* a = reinterpret_cast<const E*>(p.a) + p.k;
  multiply_panel(rows, cols,
                 WideTile<E>{a, p.pitch / int64_t{sizeof(E)}, b, kPanelCols * P, kLanes * P,
                             p.depth, p.c, p.ldc, p.k > 0},
                 scratch);
}

}  // namespace sl
