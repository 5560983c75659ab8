// Rows of bf16 times panels of bf16 in the tile registers of AMX: 16 rows by 16 columns by 32 k an
// instruction. A panel is a tile as it lies, and so are rows.
//
// Each output is one chain over blocks of k from 0 on, of 32 or what is asked for: of a block, the
// even k and the odd ones are chains of fma from zero, whose sum is added. Fewer rows or columns
// change nothing of that, so one row alone goes through tiles too.
#pragma once
#include <algorithm>

#include "sinterlm/cut.h"
#include "sinterlm/tile_state.h"

namespace sl {

constexpr int kTileRows = 16;

// What one walk along k multiplies: `steps` times `depth` k, of up to 64 columns.
struct TileWalk {
  const bf16* a;
  int64_t lda;
  const bf16* b;
  int64_t k_step, col_step;  // elements per 2 k and per 16 columns
  float* c;
  int64_t ldc;
  bool accumulate;
  int64_t next;  // bytes to what is read after these weights; 0: nobody knows
  int depth, steps;
};

// Lines of weights that are asked for while tiles compute, some every turn, in the order of memory.
class TileAhead {
 public:
  // `lines` times `cols` of them, from `first` on: bytes from each to the next and to its
  // neighbour.
  TileAhead(const char* first, int64_t pitch, int64_t stride, int cols, int lines, int turns)
      : row_(first),
        pitch_(pitch),
        stride_(stride),
        cols_(cols),
        left_(lines),
        each_((lines + turns - 1) / turns) {}
  SL_MEMBER void turn() {
    const int n = std::min(left_, each_);
    for (int i = 0; i < n; ++i, row_ += pitch_)
      for (int j = 0; j < cols_; ++j) __builtin_prefetch(row_ + j * stride_, 0, 2);
    left_ -= n;
  }

 private:
  const char* row_;
  int64_t pitch_, stride_;
  int cols_, left_, each_;
};

// g++ builds these instructions from the names of registers, and does not say that they read and
// write memory: order is kept by barriers for the compiler.
#define SL_TILE_BEGIN(tile, to)   \
  do {                            \
    if (w.accumulate)             \
      _tile_loadd(tile, to, ldc); \
    else                          \
      _tile_zero(tile);           \
  } while (0)

// Up to 16 rows of C x 16 columns.
template <int C>
inline void walk_low(const TileWalk& w, TileAhead& ahead) {
  const long lda = w.lda * 2, ldb = w.k_step * 2, ldc = w.ldc * 4;
  const bf16 *a = w.a, *b = w.b;
  float* const c = w.c;
  asm volatile("" ::: "memory");
  SL_TILE_BEGIN(0, c);
  if constexpr (C > 1) SL_TILE_BEGIN(1, c + 16);
  if constexpr (C > 2) SL_TILE_BEGIN(2, c + 32);
  if constexpr (C > 3) SL_TILE_BEGIN(3, c + 48);
  for (int i = 0; i < w.steps; ++i, a += w.depth, b += w.depth / 2 * w.k_step) {
    ahead.turn();
    _tile_loadd(4, a, lda);
    _tile_loadd(6, b, ldb);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C > 1) {
      _tile_loadd(7, b + w.col_step, ldb);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (C > 2) {
      _tile_loadd(6, b + 2 * w.col_step, ldb);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (C > 3) {
      _tile_loadd(7, b + 3 * w.col_step, ldb);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, c, ldc);
  if constexpr (C > 1) _tile_stored(1, c + 16, ldc);
  if constexpr (C > 2) _tile_stored(2, c + 32, ldc);
  if constexpr (C > 3) _tile_stored(3, c + 48, ldc);
  asm volatile("" ::: "memory");
}

// 17 to 32 rows of C x 16 columns.
template <int C>
inline void walk_high(const TileWalk& w, TileAhead& ahead) {
  const long lda = w.lda * 2, ldb = w.k_step * 2, ldc = w.ldc * 4;
  const bf16 *a = w.a, *b = w.b;
  float *const c = w.c, *const lower = c + kTileRows * w.ldc;
  asm volatile("" ::: "memory");
  SL_TILE_BEGIN(0, c);
  if constexpr (C > 1) SL_TILE_BEGIN(1, c + 16);
  SL_TILE_BEGIN(2, lower);
  if constexpr (C > 1) SL_TILE_BEGIN(3, lower + 16);
  for (int i = 0; i < w.steps; ++i, a += w.depth, b += w.depth / 2 * w.k_step) {
    ahead.turn();
    _tile_loadd(6, b, ldb);
    _tile_loadd(4, a, lda);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + kTileRows * w.lda, lda);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (C > 1) {
      _tile_loadd(7, b + w.col_step, ldb);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, ldc);
  if constexpr (C > 1) _tile_stored(1, c + 16, ldc);
  _tile_stored(2, lower, ldc);
  if constexpr (C > 1) _tile_stored(3, lower + 16, ldc);
  asm volatile("" ::: "memory");
}
#undef SL_TILE_BEGIN

// As many rounds of four products of full tiles, of bf16 or of codes, without memory; `operands`
// are 1 KB of zeros.
template <bool kCodes>
inline int spin_tiles(int rounds, const char* operands) {
  TileState::set({kTileRows, kTileRows, kTileDepth / 2});
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, operands, 64);
  _tile_loadd(5, operands, 64);
  _tile_loadd(6, operands, 64);
  _tile_loadd(7, operands, 64);
  for (int i = 0; i < rounds; ++i) {
    if constexpr (kCodes) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  return 0;
}

// All rows along one walk, `cols` x 16 columns.
inline void walk_rows(int rows, int cols, const TileWalk& walk) {
  const auto at = [&](int r, int j) {
    TileWalk w = walk;
    w.a += r * w.lda;
    w.b += j * w.col_step;
    w.c += r * w.ldc + j * kLanes;
    return w;
  };
  constexpr int kHigh = 2 * kTileRows;
  const int left = rows % kHigh;
  const int high = left > kTileRows ? rows : rows - left;  // rows that go by two tiles
  const int walks = (high + kHigh - 1) / kHigh * ((cols + 1) / 2) + (high < rows);
  const int lines = walk.next == 0 ? 0 : walk.steps * walk.depth / 2;
  TileAhead ahead(reinterpret_cast<const char*>(walk.b) + walk.next, walk.k_step * 2,
                  walk.col_step * 2, cols, lines, walks * walk.steps);
  for (int j = 0; j < cols; j += 2)
    for (int r = 0; r < high; r += kHigh) {
      TileState::set({kTileRows, std::min(kTileRows, rows - r - kTileRows), walk.depth / 2});
      cols - j > 1 ? walk_high<2>(at(r, j), ahead) : walk_high<1>(at(r, j), ahead);
    }
  if (high == rows) return;
  TileState::set({left, left, walk.depth / 2});
  switch (cols) {
    case 1:
      return walk_low<1>(at(high, 0), ahead);
    case 2:
      return walk_low<2>(at(high, 0), ahead);
    case 3:
      return walk_low<3>(at(high, 0), ahead);
    default:
      return walk_low<4>(at(high, 0), ahead);
  }
}

// c[rows][ldc] (+)= a[rows][lda] times K k (even) of `cols` x 16 columns, in blocks of w.depth (up
// to 32).
inline void multiply_tiles(int rows, int cols, const TileWalk& w, int K) {
  // Few rows wait for memory, which is quickest in its own order: keys lie column after column.
  const int wide = rows <= kTileRows && w.k_step < w.col_step ? 1 : 4;
  for (int j = 0; j < cols; j += wide) {
    TileWalk walk = w;
    walk.b += j * w.col_step;
    walk.c += j * kLanes;
    for (int k = 0; k < K; k += walk.depth * walk.steps) {
      walk.depth = std::min(K - k, w.depth);
#ifdef SL_MUTATE_K_UNROLL  // shorter blocks at M = 1: the invariance tests must notice
      if (rows == 1) walk.depth = std::min(K - k, w.depth / 2);
#endif
      walk.steps = (K - k) / walk.depth;
      walk_rows(rows, std::min(wide, cols - j), walk);
      walk.a += walk.depth * walk.steps;
      walk.b += walk.depth * walk.steps / 2 * w.k_step;
      walk.accumulate = true;
    }
  }
}

}  // namespace sl
