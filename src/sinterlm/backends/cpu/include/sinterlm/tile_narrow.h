// The register tile over panels of codes at levels with few registers: the sums of tile_coded.h.
//
// Outputs stay in memory, a step is multiplied part by part, and from some rows on columns are made
// ready once for all of them (ready.h).
#pragma once
#include "sinterlm/ready.h"
#include "sinterlm/tile_coded.h"
#if defined(SL_ISA_AMX)
#include "sinterlm/tile_amx_coded.h"
#endif

namespace sl {

// Where the tile gets its weights: at() is the step of depth k and of the 16 columns from `col` on,
// which lies at `codes` in the panel; that of the next 16 is kColumns bytes away, the next step
// kStride. load() gives one part of a step.
template <class F>
struct CodesInPanel {
  using Shape = TileShape<typename F::Act>;
  using Ahead = sl::Ahead;
  static constexpr int kStep = F::kStep, kParts = Dot<F::kBits>::kParts;
  static constexpr int kStride = F::kStepBytes, kColumns = 4 * kLanes;

  Ahead ahead(const PanelPiece& p) const { return Ahead(p.next); }
  const uint8_t* at(const uint8_t* codes, int col, int) const { return codes + col * 4; }
  SL_INLINE auto load(const uint8_t* b, int part) { return Dot<F::kBits>::load(b, part); }
};

template <class F>
struct ReadyCodes {
  using Shape = ReadyShape<kReadyCodeRows>;
  using Ahead = AheadByTurns;
  using D = Dot<F::kBits>;
  static constexpr int kStep = F::kStep / D::kParts, kParts = 1;
  static constexpr int kStride = sizeof(typename D::Weights), kColumns = 0;
  static constexpr int kDepth = static_cast<int>(kReadyBytes) / kStride * kStep;
  const uint8_t* ready;  // [k / kStep] weights of 16 columns
  int first;             // k where they begin
  AheadByTurns next;

  const AheadByTurns& ahead(const PanelPiece&) const { return next; }
  const uint8_t* at(const uint8_t*, int, int k) const {
    return ready + (k - first) / kStep * kStride;
  }
  SL_INLINE auto load(const uint8_t* b, int) { return D::Weights::load(b); }
  // Makes `depth` k of 16 columns from `col` on ready; k begins a group where there are some.
  static void make(const uint8_t* panel, int col, int k, int depth, uint8_t* ready) {
    for (const int end = k + depth; k < end;) {
      const uint8_t* codes = F::codes_at(panel, k) + col * 4;
      const int stop = F::kGroup == 0 ? end : std::min(end, k + F::kGroup);
      for (; k < stop; k += F::kStep, codes += F::kStepBytes)
#pragma GCC unroll 2
        for (int part = 0; part < D::kParts; ++part, ready += kStride)
          D::load(codes, part).store(ready);
    }
  }
};

template <class F, class Source>
struct NarrowTile : CodedTile<F> {
  using Shape = typename Source::Shape;
  using CodedTile<F>::p, CodedTile<F>::row, CodedTile<F>::kOneScale;
  Source source;

  typename Source::Ahead ahead() const { return source.ahead(p); }
  template <int R, int C>
  void run(int r0, int j0, typename Source::Ahead ahead) const {
    float* c = p.c + r0 * p.ldc + j0 * kLanes;
    if (p.k == 0) clear_outputs<R, C>(c, p.ldc);
    const int col = p.col + j0 * kLanes, end = p.k + p.depth;
    const uint8_t* panel = reinterpret_cast<const uint8_t*>(p.panel);
    for (int k = p.k; k < end;) {
      const uint8_t* codes = F::codes_at(panel, k);
      const int group_end = F::group_end(p.K, k), stop = std::min(end, group_end);
      const uint8_t* tail = F::tail(codes, group_end - k);
      for (; k < stop; k += F::kBlock) {
        Ints dot[R][C];
        dots<R, C>(dot, r0, k, source.at(codes, col, k), ahead);
        codes += F::code_bytes(F::kBlock);
        Vec total[R][C];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int j = 0; j < C; ++j) total[r][j] = load(c + r * p.ldc + j * kLanes);
        this->template scale<R, C>(total, dot, r0, k, tail, col);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int j = 0; j < C; ++j) store(c + r * p.ldc + j * kLanes, total[r][j]);
        ahead.turn();
      }
    }
    if (kOneScale && end == p.K) this->scale_all(R, C, c, col);
  }

 private:
  using D = Dot<F::kBits>;
  static constexpr int kSteps = F::kBlock / Source::kStep;

  SL_MEMBER Ints start(int r, int k) const {
    return set1_int(F::kOffsets ? 0 : -F::kCentre * this->sum(r, k));
  }

  // The integer dot products of one block.
  template <int R, int C>
  SL_MEMBER void dots(Ints (&dot)[R][C], int r0, int k, const uint8_t* b,
                      const typename Source::Ahead& ahead) const {
    constexpr int kRun = D::kRun * (F::kStep / Source::kStep), kLength = std::min(kSteps, kRun);
    // Nothing but sums is held while they run; three rows of nibbles were slower that way (g++ 12).
    constexpr bool kStartsLate = kSteps <= kRun && !(F::kBits == 4 && R == 3);
    if constexpr (!kStartsLate) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Ints first = start(r0 + r, k);
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) dot[r][j] = first;
      }
    }
    const typename F::Act* a = reinterpret_cast<const typename F::Act*>(row(r0)) + k;
    const int64_t lda = p.pitch / int64_t{sizeof(typename F::Act)};
    for (int step = 0; step < kSteps; step += kLength) {
      typename D::Sum sums[R][C];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j)
          sums[r][j] = D::begin(kStartsLate ? start(r0 + r, k) : dot[r][j]);
#pragma GCC unroll 2
      for (int part = 0; part < Source::kParts; ++part) {  // each a walk, as registers are few
        const typename F::Act* ap = a + part * (F::kStep / Source::kParts);
        const uint8_t* bp = b;
        for (int s = 0; s < kLength; ++s) {
          if constexpr (C < kPanelCols / kLanes)  // else one row tile reads all
            if (part == 0) ahead.ask(bp);
          typename D::Weights w[C];
#pragma GCC unroll 4
          for (int j = 0; j < C; ++j) w[j] = Source::load(bp + j * Source::kColumns, part);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) sums[r][j] = D::mac(sums[r][j], ap + r * lda, w[j]);
          ap += Source::kStep;
          bp += Source::kStride;
        }
      }
      a += kLength * Source::kStep;
      b += kLength * Source::kStride;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j)
          dot[r][j] = D::fold(kStartsLate ? start(r0 + r, k) : dot[r][j], sums[r][j]);
    }
  }
};

// Rows from which columns are made ready: taking nibbles apart again costs more than bytes.
template <class F>
constexpr int kReadyFrom = F::kBits == 4 ? 6 : 16;

template <class F>
inline void multiply_narrow(int rows, int cols, PanelPiece p, void* scratch) {
  using Ready = ReadyCodes<F>;
  static_assert(Ready::kDepth % 128 == 0, "what is ready ends where a group of weights does");
  if (rows < kReadyFrom<F>) {
    panel_rows(rows, cols, NarrowTile<F, CodesInPanel<F>>{{p}, {}});
    return;
  }
  const uint8_t* panel = reinterpret_cast<const uint8_t*>(p.panel);
  uint8_t* ready = static_cast<uint8_t*>(scratch);
  const int first = p.k, end = p.k + p.depth;
  for (int j = 0; j < cols; ++j, p.c += kLanes, p.col += kLanes)
    for (p.k = first; p.k < end; p.k += Ready::kDepth) {
      p.depth = std::min(Ready::kDepth, end - p.k);
      Ready::make(panel, p.col, p.k, p.depth, ready);
      const AheadByTurns next(F::codes_at(panel, p.k) + p.col * 4, p.next, p.depth / F::kStep,
                              p.depth, F::kBlock);
      panel_rows(rows, 1, NarrowTile<F, Ready>{{p}, {ready, p.k, next}});
    }
}

template <int Bits, int Group, bool Offsets, int ActGroup>
inline void multiply(Coded<Bits, Group, Offsets, ActGroup>, int rows, int cols, const PanelPiece& p,
                     void* scratch) {
  using F = Coded<Bits, Group, Offsets, ActGroup>;
#if defined(SL_ISA_AMX)
  if (rows >= kCodeTilesFrom) return multiply_coded_tiles<F>(rows, cols, p);
#endif
  if constexpr (kFewRegisters)
    multiply_narrow<F>(rows, cols, p, scratch);
  else
    panel_rows(rows, cols, CodedTile<F>{p});
}

}  // namespace sl
