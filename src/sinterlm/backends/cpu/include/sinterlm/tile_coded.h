// The register tile over panels of codes, and panels of codes turned into panels of E.
//
// Integers are summed over one block of k, at most a group of weights or of activations; then
//   c += dot * (weight scale * activation scale)  [+ (offset * activation scale) * sum of codes]
// in fp32, block after block. Codes are unsigned: without offsets a sum begins at -centre * (sum of
// activation codes), so that it ends as the exact integer dot product of signed codes.
#pragma once
#include "sinterlm/tile_wide.h"

#define SL_MEMBER inline __attribute__((always_inline))

namespace sl {

template <class F>
struct CodedTile {
  using Shape = TileShape<typename F::Act>;
  PanelPiece p;

  template <int R, int C>
  void run(int r0, int j0) const {
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
        dots<R, C>(dot, r0, k, codes + col * 4);
        codes += F::code_bytes(F::kBlock);
        scale<R, C>(total, dot, r0, k, tail, col);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) store(c + r * p.ldc + j * kLanes, total[r][j]);
  }

 private:
  using D = Dot<F::kBits>;
  static constexpr int kSteps = F::kBlock / F::kStep;

  const char* row(int r) const { return p.a + r * p.pitch; }
  int32_t sum(int r, int k) const {
    return reinterpret_cast<const int32_t*>(row(r) + F::sums_at(p.K))[k / F::kBlock];
  }
  float act_scale(int r, int k) const {
    return reinterpret_cast<const float*>(row(r) + F::scales_at(p.K))[k / F::kUnit];
  }

  // The integer dot products of one block.
  template <int R, int C>
  SL_MEMBER void dots(Ints (&dot)[R][C], int r0, int k, const uint8_t* b) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Ints start = set1_int(F::kOffsets ? 0 : -F::kCentre * sum(r0 + r, k));
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) dot[r][j] = start;
    }
    const typename F::Act* a = reinterpret_cast<const typename F::Act*>(row(r0)) + k;
    const int64_t lda = p.pitch / int64_t{sizeof(typename F::Act)};
    for (int run = 0; run < kSteps; run += D::kRun) {
      typename D::Sum part[R][C];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) part[r][j] = D::begin(dot[r][j]);
      constexpr int kLength = kSteps < D::kRun ? kSteps : D::kRun;
      for (int s = 0; s < kLength; ++s) {
        typename D::Weights w[C];
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) w[j] = D::load(b + j * 4 * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int j = 0; j < C; ++j) part[r][j] = D::mac(part[r][j], a + r * lda, w[j]);
        a += F::kStep;
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
      const Vec weight_scale = F::scales(tail, col + j * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec act = set1(act_scale(r0 + r, k));
        Vec v = fma(to_floats(dot[r][j]), mul(weight_scale, act), total[r][j]);
        if constexpr (F::kOffsets) {
          const Vec codes = set1(static_cast<float>(sum(r0 + r, k)));
          v = fma(mul(F::offsets(tail, col + j * kLanes), act), codes, v);
        }
        total[r][j] = v;
      }
    }
  }
};

template <int Bits, int Group, bool Offsets, int ActGroup>
inline void multiply(Coded<Bits, Group, Offsets, ActGroup>, int rows, int cols, const PanelPiece& p,
                     void*) {
  panel_rows(rows, cols, CodedTile<Coded<Bits, Group, Offsets, ActGroup>>{p});
}

constexpr int kPieceDepth = 256;                                 // k that are unpacked together
constexpr size_t kUnpackedBytes = kPieceDepth * kPanelCols * 4;  // room for them in fp32
constexpr size_t kPieceBytes = kUnpackedBytes + kOperandBytes;

// 16 columns of one step of codes -> panels of E whose next P k lie 64 * P elements apart.
template <class F>
inline void unpack_step(const uint8_t* codes, Vec scale, Vec offset, float* out) {
  for (int k = 0; k < F::kStep; ++k) {
    const Vec code = codes_of<F::kBits>(codes, 8 * (k % 4) + 4 * (k / 4));
    const Vec w = F::kOffsets ? add(mul(scale, code), offset)
                              : mul(scale, sub(code, set1(float{F::kCentre})));
    store(out + k * kPanelCols, w);
  }
}
template <class F>
inline void unpack_step(const uint8_t* codes, Vec scale, Vec offset, bf16* out) {
  float wide[F::kStep * kPanelCols];
  unpack_step<F>(codes, scale, offset, wide);
  for (int k = 0; k < F::kStep; k += 2)
    store_pairs(out + k * kPanelCols, load(wide + k * kPanelCols),
                load(wide + (k + 1) * kPanelCols));
}

// The panel's k in [k, k + depth) and columns from `col` on, as a panel of E of `cols` x 16
// columns.
template <class F, class E = typename F::Element>
inline void unpack_piece(const uint8_t* panel, int K, int k, int depth, int col, int cols, E* out) {
  for (const int end = k + depth; k < end;) {
    const uint8_t* codes = F::codes_at(panel, k);
    const int group_end = F::group_end(K, k), stop = std::min(end, group_end);
    const uint8_t* tail = F::tail(codes, group_end - k);
    for (int j = 0; j < cols; ++j) {
      const int at = col + j * kLanes;
      const Vec scale = F::scales(tail, at);
      const Vec offset = F::kOffsets ? F::offsets(tail, at) : zero();
      const uint8_t* from = codes + at * 4;
      E* to = out + j * kLanes * kPair<E>;
      for (int i = k; i < stop; i += F::kStep) {
        unpack_step<F>(from, scale, offset, to);
        from += F::kStepBytes;
        to += F::kStep * kPanelCols;
      }
    }
    out += (stop - k) * kPanelCols;
    k = stop;
  }
}

template <class E, int Bits, int Group, bool Offsets>
inline void multiply(WeightOnly<E, Bits, Group, Offsets>, int rows, int cols, const PanelPiece& p,
                     void* scratch) {
  E* piece = static_cast<E*>(scratch);
  constexpr int P = kPair<E>;
  for (int k = p.k; k < p.k + p.depth; k += kPieceDepth) {
    const int depth = std::min(kPieceDepth, p.k + p.depth - k);
    unpack_piece<WeightOnly<E, Bits, Group, Offsets>>(reinterpret_cast<const uint8_t*>(p.panel),
                                                      p.K, k, depth, p.col, cols, piece);
    const E* a = reinterpret_cast<const E*>(p.a) + k;
    multiply_panel(rows, cols, a,
                   WideTile<E>{nullptr, p.pitch / int64_t{sizeof(E)}, piece, kPanelCols * P,
                               kLanes * P, depth, p.c, p.ldc, k > 0},
                   static_cast<char*>(scratch) + kUnpackedBytes);
  }
}

}  // namespace sl
