// The register tile over panels of codes that meet activations in codes.
//
// Integers are summed over one block of k, at most a group of weights or of activations; then
//   c += dot * (weight scale * activation scale)  [+ (offset * activation scale) * sum of codes]
// in fp32, block after block; where one scale is for all of k and nothing else stands beside it,
// sums meet it once, behind the last block. Codes are unsigned: without offsets a sum begins at
// -centre * (sum of activation codes), so that it ends as the exact integer dot product of signed
// codes.
#pragma once
#include "sinterlm/tile_wide.h"

namespace sl {

template <class F>
struct CodedTile {
  using Shape = TileShape<typename F::Act>;
  PanelPiece p;

  Ahead ahead() const { return Ahead(p.next); }
  template <int R, int C>
  void run(int r0, int j0, Ahead ahead) const {
    float* c = p.c + r0 * p.ldc + j0 * kLanes;
    Vec total[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) total[r][j] = p.k > 0 ? load(c + r * p.ldc + j * kLanes) : zero();
    const int col = p.col + j0 * kLanes, end = p.k + p.depth;
    const uint8_t* panel = reinterpret_cast<const uint8_t*>(p.panel);
    for (int k = p.k; k < end;) {
      const uint8_t* codes = F::codes_at(panel, k);
      const int group_end = F::group_end(p.K, k), stop = std::min(end, group_end);
      const uint8_t* tail = F::tail(codes, group_end - k);
      for (; k < stop; k += F::kBlock) {
        Ints dot[R][C];
        dots<R, C>(dot, r0, k, codes + col * 4, ahead);
        codes += F::code_bytes(F::kBlock);
        scale<R, C>(total, dot, r0, k, tail, col);
        ahead.turn();
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) store(c + r * p.ldc + j * kLanes, total[r][j]);
    if (kOneScale && end == p.K) scale_all(R, C, c, col);
  }

 protected:
  using D = Dot<F::kBits>;
  static constexpr int kSteps = F::kBlock / F::kStep;
  static constexpr bool kOneScale = F::kGroup == 0 && !F::kOffsets;

  const char* row(int r) const { return p.a + r * p.pitch; }
  int32_t sum(int r, int k) const {
    return reinterpret_cast<const int32_t*>(row(r) + F::sums_at(p.K))[k / F::kBlock];
  }
  float act_scale(int r, int k) const {
    return reinterpret_cast<const float*>(row(r) + F::scales_at(p.K))[k / F::kUnit];
  }

  // The integer dot products of one block.
  template <int R, int C>
  SL_MEMBER void dots(Ints (&dot)[R][C], int r0, int k, const uint8_t* b,
                      const Ahead& ahead) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Ints start = set1_int(F::kOffsets ? 0 : -F::kCentre * sum(r0 + r, k));
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) dot[r][j] = start;
    }
    const typename F::Act* a = reinterpret_cast<const typename F::Act*>(row(r0)) + k;
    const int64_t lda = p.pitch / int64_t{sizeof(typename F::Act)};
    // Rows and one offset that the compiler knows nothing of: else g++ 12 counts each row up by
    // itself, runs out of registers and keeps weights in memory (five rows, 8 bits: 75 % of peak
    // instead of 84).
    const typename F::Act* rows[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) rows[r] = a + r * lda;
    int64_t at = 0;
    for (int run = 0; run < kSteps; run += D::kRun) {
      typename D::Sum part[R][C];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) part[r][j] = D::begin(dot[r][j]);
      constexpr int kLength = kSteps < D::kRun ? kSteps : D::kRun;
      for (int s = 0; s < kLength; ++s) {
        if constexpr (C < kPanelCols / kLanes) ahead.ask(b);  // else one row tile reads all
        typename D::Weights w[C];
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) w[j] = D::load(b + j * 4 * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int j = 0; j < C; ++j) part[r][j] = D::mac(part[r][j], rows[r] + at, w[j]);
        at += F::kStep;
        asm("" : "+r"(at));
        b += F::kStepBytes;
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) dot[r][j] = D::fold(dot[r][j], part[r][j]);
    }
  }

  // total += what one block's dot products stand for.
  template <int R, int C>
  SL_MEMBER void scale(Vec (&total)[R][C], const Ints (&dot)[R][C], int r0, int k,
                       const uint8_t* tail, int col) const {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      const Scales scales(tail, col + j * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        total[r][j] = scales.add(total[r][j], to_floats(dot[r][j]), set1(act_scale(r0 + r, k)),
                                 F::kOffsets ? sum(r0 + r, k) : 0);
    }
  }

  // What is left to do behind the last block, where kOneScale.
  void scale_all(int rows, int cols, float* c, int col) const {
    const uint8_t* tail = F::tail(reinterpret_cast<const uint8_t*>(p.panel), p.K);
    for (int j = 0; j < cols; ++j, c += kLanes, col += kLanes) {
      const Vec scale = F::scales(tail, col);
      for (int r = 0; r < rows; ++r) store(c + r * p.ldc, mul(load(c + r * p.ldc), scale));
    }
  }

  // Of 16 columns of weights.
  struct Scales {
    Vec scale, offset;
    Scales() = default;
    SL_MEMBER Scales(const uint8_t* tail, int col) : scale(F::scales(tail, col)) {
      if constexpr (F::kOffsets) offset = F::offsets(tail, col);
    }
    // total + the dot products of a row and block with this scale, unless it waits, and sum of
    // codes.
    SL_MEMBER Vec add(Vec total, Vec dot, Vec act, int32_t codes) const {
      if constexpr (kOneScale) return fma(dot, act, total);
      const Vec v = fma(dot, mul(scale, act), total);
      if constexpr (F::kOffsets) return fma(mul(offset, act), set1(static_cast<float>(codes)), v);
      return v;
    }
  };
};

}  // namespace sl
