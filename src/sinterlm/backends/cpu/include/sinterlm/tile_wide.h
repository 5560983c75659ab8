// The register tile over panels of E, and how a tile's shape is chosen for any number of rows.
#pragma once
#include <algorithm>

#include "sinterlm/cut.h"
#include "sinterlm/ready.h"
#if defined(SL_ISA_AMX)
#include "sinterlm/tile_amx.h"
#endif

namespace sl {

// Lines of weights that a tile asks for on its way, so that memory is read while it computes: those
// that lie `next` bytes further on, where the next pass begins. A core has few misses in flight (24
// on Zen 4) and waits where more are asked for, so the tiles over the rows of one piece share the
// `width` lines of a step: each asks for every tiles-th, one or two, beginning at its own, and
// takes the line before it each turn, for else a tile without a line would leave memory at rest.
// Where one tile would need more than two, it reads memory itself and the hardware's prefetcher
// does better.
class Ahead {
 public:
  static constexpr int kTurn = 64;  // k

  explicit Ahead(int64_t next) : next_(next) {}
  int64_t next() const { return next_; }
  // For tile i of those that walk the same lines.
  Ahead share(int i, int tiles, int width) const {
    Ahead mine(next_);
    mine.line_ = i;
    mine.tiles_ = tiles;
    mine.width_ = width > 2 * tiles ? 0 : width;
    mine.aim();
    return mine;
  }
  SL_MEMBER void turn() {
    line_ = (line_ == 0 ? tiles_ : line_) - 1;
    aim();
  }
  // Inlined by force: g++ takes a function that only prefetches for one that does nothing.
  SL_MEMBER void ask(const void* step) const {
    __builtin_prefetch(static_cast<const char*>(step) + first_, 0, 2);
    __builtin_prefetch(static_cast<const char*>(step) + second_, 0, 2);
  }

 private:
  // Bytes from a step to its lines that are asked for; 0, the step itself, is there already.
  SL_MEMBER void aim() {
    constexpr int64_t kLine = kLanes * 4;
    first_ = line_ < width_ ? next_ + line_ * kLine : 0;
    second_ = line_ + tiles_ < width_ ? next_ + (line_ + tiles_) * kLine : 0;
  }

  int64_t next_, first_ = 0, second_ = 0;
  int line_ = 0, tiles_ = 1, width_ = 0;
};

// For what lies in a cache.
struct NothingAhead {
  static constexpr int kTurn = 1 << 30;
  int64_t next() const { return 0; }
  NothingAhead share(int, int, int) const { return {}; }
  SL_MEMBER void turn() {}
  SL_MEMBER void ask(const void*) const {}
};

template <int R, int C>
SL_INLINE void clear_outputs(float* c, int64_t ldc) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) store(c + r * ldc + j * kLanes, zero());
}

// c[R][ldc] (+)= a[R][lda] * one step of C * 16 columns per P k. `b` advances by k_step per P k and
// col_step per 16 columns (elements), so that weights, K pages and V pages are all panels.
template <class E, int R, int C, class A>
inline void tile(const Operand<E>* a, int64_t lda, const E* b, int64_t k_step, int64_t col_step,
                 int K, float* c, int64_t ldc, bool accumulate, A ahead) {
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
  for (int k = 0; k < K; ahead.turn())
    for (const int stop = std::min(K, k + A::kTurn); k < stop; k += kPair<E>, b += k_step) {
      ahead.ask(b);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) {
#pragma GCC unroll 2
        for (int part = 0; part < Panel<E>::kParts; ++part) {
          const Panel<E> w = Panel<E>::load(b + j * col_step, part);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#ifdef SL_MUTATE_K_UNROLL
            if (R == 1 && (k / kPair<E>) % 2) {
              odd[r][j] = Panel<E>::mac(odd[r][j], a + r * lda + k + part, w);
              continue;
            }
#endif
            sum[r][j] = Panel<E>::mac(sum[r][j], a + r * lda + k + part, w);
          }
        }
      }
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

// Calls t.run<R, C>(..., ahead) for run-time rows and columns (of 16) of at most the tile's shape.
template <class Tile, class A, int R = Tile::Shape::kRows, int C = Tile::Shape::cols(R)>
inline void tile_any(const Tile& t, int rows, int cols, int r0, int j0, A ahead) {
  if constexpr (R > 1) {
    if (rows < R) {
      tile_any<Tile, A, R - 1>(t, rows, cols, r0, j0, ahead);
      return;
    }
  }
  if constexpr (C > 1) {
    if (cols < C) {
      tile_any<Tile, A, R, C - 1>(t, rows, cols, r0, j0, ahead);
      return;
    }
  }
  t.template run<R, C>(r0, j0, ahead);
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
      tile_any(t, r1 - r0, width, r0, j, t.ahead().share(i, tiles, width));
    }
  }
}

// Operands times panels of E, or of codes; see tile().
template <class E, class A = NothingAhead>
struct WideTile {
  using Shape = TileShape<E>;
  const Operand<E>* a;
  int64_t lda;
  const E* b;
  int64_t k_step, col_step;
  int K;
  float* c;
  int64_t ldc;
  bool accumulate;
  A next;

  A ahead() const { return next; }
  template <int R, int C>
  void run(int r0, int j0, A share) const {
    tile<E, R, C>(a + r0 * lda, lda, b + j0 * col_step, k_step, col_step, K,
                  c + r0 * ldc + j0 * kLanes, ldc, accumulate, share);
  }
};

// c (+)= a * b of a tile, any rows and columns of 16. Where k are summed in blocks, they are blocks
// of `depth`.
template <class E, class A>
inline void wide_rows(int rows, int cols, const WideTile<E, A>& t, int depth = kTileDepth) {
#if defined(SL_ISA_AMX)
  if constexpr (kInTiles<E>) {
    const TileWalk walk{t.a,   t.lda,        t.b,           t.k_step, t.col_step, t.c,
                        t.ldc, t.accumulate, t.next.next(), depth,    0};
    return multiply_tiles(rows, cols, walk, t.K);
  }
#endif
  panel_rows(rows, cols, t);
}

// Rows times k in [k, k + depth) of one panel, from column `col` on: what one pass computes.
struct PanelPiece {
  const char* a;  // row 0 of the operand
  int64_t pitch;  // bytes from row to row
  const char* panel;
  int K, k, depth, col;
  float* c;  // row 0, column `col`
  int64_t ldc;
  int64_t next;  // bytes to the weights that are read after this pass
};

constexpr int kOperandDepth = 256;  // k that are made operands together: 96 rows are 96 KB, in L2
constexpr size_t kOperandBytes = kOperandDepth * kRowBlock * sizeof(float);

// `depth` k of rows of E, *lda apart, as the tile's operands: made in `wide` where they are not.
template <class E>
inline const Operand<E>* operands(int rows, const E* a, int depth, int64_t* lda, float* wide) {
  if constexpr (std::is_same_v<Operand<E>, E>) {
    return a;
  } else {
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < depth; i += kLanes)
        store_operands(wide + r * kOperandDepth + i, a + r * *lda + i);
    *lda = kOperandDepth;
    return wide;
  }
}

// Rows of E, t.lda apart, times a panel: in pieces where operands have to be made. Each output
// stays the same chain.
template <class E>
inline void multiply_panel(int rows, int cols, const E* a, WideTile<E, Ahead> t, void* scratch) {
  constexpr bool kMade = !std::is_same_v<Operand<E>, E>;
  const int64_t pitch = t.lda, K = t.K;
  for (int k = 0; k < K; k += t.K) {
    t.K = static_cast<int>(kMade ? std::min<int64_t>(kOperandDepth, K - k) : K);
    t.lda = pitch;
    t.a = operands(rows, a + k, t.K, &t.lda, static_cast<float*>(scratch));
    wide_rows(rows, cols, t);
    t.b += t.K / kPair<E> * t.k_step;
    t.accumulate = true;
  }
}

template <class E>
inline void multiply(Wide<E>, int rows, int cols, const PanelPiece& p, void* scratch) {
  constexpr int P = kPair<E>;
  const E* b = reinterpret_cast<const E*>(p.panel) + int64_t(p.k) * kPanelCols + p.col * P;
  const E* a = reinterpret_cast<const E*>(p.a) + p.k;
  // Tiles ask for what lies right behind, by measurement.
  const int64_t next = kInTiles<E> ? Wide<E>::panel_bytes(p.depth) : p.next;
  multiply_panel(rows, cols, a,
                 WideTile<E, Ahead>{nullptr, p.pitch / int64_t{sizeof(E)}, b, kPanelCols * P,
                                    kLanes * P, p.depth, p.c, p.ldc, p.k > 0, Ahead(next)},
                 scratch);
}

}  // namespace sl
