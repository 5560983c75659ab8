// The register tile over panels of codes that meet activations in E.
//
// A code, less its centre where there are no offsets, is a whole number that bf16 holds exactly.
// So codes are multiplied as they are, and the scale of a group meets the sums over one block of k:
//   c += scale * sum(a * (code - centre)),  or  c += scale * sum(a * code) + offset * sum(a)
// in fp32, block after block. Few rows turn codes into panels in registers, where the level can;
// for more a piece of the panel is unpacked once. Both give the same numbers.
#pragma once
#include "sinterlm/tile_wide.h"

namespace sl {

constexpr int kPieceDepth = kOperandDepth;                       // k that are unpacked together
constexpr size_t kUnpackedBytes = kPieceDepth * kPanelCols * 4;  // room for them in fp32
constexpr size_t kPieceBytes = kUnpackedBytes + kOperandBytes;

// Products along k that are summed before a scale meets them.
template <class F>
constexpr int kWeightBlock = F::kGroup == 0 ? kPieceDepth : F::kGroup;
static_assert(kPieceDepth % 128 == 0, "a piece ends where a group of weights does");

// Where ScaledTile gets its panels: at(k, j0) is where depth k of the piece begins, for columns
// from j0 x 16 on, and kStride further the next kDepth k of a block; add() adds their products.
template <class F>
struct UnpackedPiece {
  using E = typename F::Element;
  using Shape = TileShape<int8_t>;
  using Ahead = NothingAhead;
  static constexpr int kDepth = kPair<E>, kStride = kDepth * kPanelCols;
  const E* piece;  // [k / P][64 columns][P]

  const E* at(int k, int j0) const {
    return piece + int64_t(k) * kPanelCols + j0 * kLanes * kDepth;
  }
  template <int R, int C>
  SL_INLINE void add(Vec (&sum)[R][C], const Operand<E>* a, int64_t lda, const E* b) {
#pragma GCC unroll 2
    for (int part = 0; part < Panel<E>::kParts; ++part) {
      Panel<E> w[C];
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) w[j] = Panel<E>::load(b + j * kLanes * kDepth, part);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) sum[r][j] = Panel<E>::mac(sum[r][j], a + r * lda + part, w[j]);
    }
  }
};

// 16 columns made ready: codes in fp32, whatever the operands were stored in.
struct ReadyNumbers {
  using Shape = ReadyShape<TileShape<float>::kRows>;
  using Ahead = NothingAhead;
  static constexpr int kDepth = 1, kStride = kLanes;
  const float* ready;  // [k][16]

  const float* at(int k, int) const { return ready + k * kLanes; }
  template <int R, int C>
  SL_INLINE void add(Vec (&sum)[R][C], const float* a, int64_t lda, const float* b) {
    static_assert(C == 1);
    const auto w = Panel<float>::load(b);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r][0] = Panel<float>::mac(sum[r][0], a + r * lda, w);
  }
};

template <class F>
struct CodesAsTheyCome {
  using E = typename F::Element;
  using Shape = TileShape<int8_t>;
  using Ahead = sl::Ahead;
  static constexpr int kDepth = F::kStep, kStride = F::kStepBytes;
  const uint8_t* panel;
  int k, col;  // where the piece begins

  const uint8_t* at(int in, int j0) const {
    return F::codes_at(panel, k + in) + (col + j0 * kLanes) * 4;
  }
  template <int R, int C>
  SL_INLINE void add(Vec (&sum)[R][C], const Operand<E>* a, int64_t lda, const uint8_t* b) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      const auto w = CodePairs<F::kBits, !F::kOffsets>::load(b + j * kLanes * 4);
#pragma GCC unroll 4
      for (int i = 0; i < kDepth / 2; ++i)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          sum[r][j] = Panel<E>::mac(sum[r][j], a + r * lda + 2 * i, {w.pairs[i]});
    }
  }
};

template <class F, class Source>
struct ScaledTile {
  using E = typename F::Element;
  using Shape = typename Source::Shape;
  PanelPiece p;  // of one piece; `a` is not used
  const Operand<E>* a;
  int64_t lda;
  const float* sums;  // [rows][kPieceDepth / kWeightBlock]: of operands, with offsets
  Source source;
  typename Source::Ahead next;

  const typename Source::Ahead& ahead() const { return next; }
  template <int R, int C>
  void run(int r0, int j0, typename Source::Ahead ahead) const {
    float* c = p.c + r0 * p.ldc + j0 * kLanes;
    Vec total[R][C];
    if constexpr (!kFewRegisters) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j)
          total[r][j] = p.k > 0 ? load(c + r * p.ldc + j * kLanes) : zero();
    } else if (p.k == 0) {
      clear_outputs<R, C>(c, p.ldc);
    }
    for (int k = 0; k < p.depth; k += kWeightBlock<F>) {
      const int stop = std::min(p.depth, k + kWeightBlock<F>);
      Vec sum[R][C];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) sum[r][j] = zero();
      auto b = source.at(k, j0);
      for (int i = k; i < stop; i += Source::kDepth, b += Source::kStride) {
        if constexpr (C < kPanelCols / kLanes) ahead.ask(b);  // else one row tile reads all
        Source::add(sum, a + r0 * lda + i, lda, b);
      }
      scale(total, c, sum, r0, k, p.col + j0 * kLanes);
    }
    if constexpr (!kFewRegisters) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) store(c + r * p.ldc + j * kLanes, total[r][j]);
    }
  }

 private:
  template <int R, int C>
  SL_MEMBER void scale(Vec (&total)[R][C], float* c, const Vec (&sum)[R][C], int r0, int k,
                       int col) const {
    const uint8_t* panel = reinterpret_cast<const uint8_t*>(p.panel);
    const int at = F::kGroup == 0 ? 0 : p.k + k;
    const uint8_t* tail = F::tail(F::codes_at(panel, at), F::group_end(p.K, at) - at);
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      const Vec weight_scale = F::scales(tail, col + j * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        if constexpr (kFewRegisters) total[r][j] = load(c + r * p.ldc + j * kLanes);
        Vec v = fma(sum[r][j], weight_scale, total[r][j]);
        if constexpr (F::kOffsets) {
          constexpr int kBlocks = kPieceDepth / kWeightBlock<F>;
          const Vec of_row = set1(sums[(r0 + r) * kBlocks + k / kWeightBlock<F>]);
          v = fma(of_row, F::offsets(tail, col + j * kLanes), v);
        }
        total[r][j] = v;
        if constexpr (kFewRegisters) store(c + r * p.ldc + j * kLanes, v);
      }
    }
  }
};

// The panel's k in [k, k + depth) and `cols` x 16 columns from `col` on, as a panel of E of Width
// columns; asks for the same codes `next` bytes further on.
template <class F, int Width = kPanelCols, class E>
inline void unpack_piece(const uint8_t* panel, int k, int depth, int col, int cols, int64_t next,
                         E* out) {
  for (const int end = k + depth; k < end;) {
    const int stop = std::min(end, (k / kWeightBlock<F> + 1) * kWeightBlock<F>);
    const uint8_t* codes = F::codes_at(panel, k) + col * 4;
    for (; k < stop; k += F::kStep) {
      for (int j = 0; j < cols; ++j) {
        __builtin_prefetch(codes + next + j * kLanes * 4, 0, 2);
        unpack_codes<F::kBits, !F::kOffsets>(codes + j * kLanes * 4, out + j * kLanes * kPair<E>,
                                             Width * kPair<E>);
      }
      codes += F::kStepBytes;
      out += F::kStep * Width;
    }
  }
}

// Sums of each block of a row's operands.
template <class F, class O>
inline void sum_blocks(const O* a, int depth, float* sums) {
  for (int k = 0; k < depth; k += kWeightBlock<F>) {
    Vec sum = zero();
    for (int i = k; i < std::min(depth, k + kWeightBlock<F>); i += kLanes)
      sum = add(sum, load_elems(a + i));
    *sums++ = reduce_add(sum);
  }
}

template <class E, int Bits, int Group, bool Offsets>
inline void multiply(WeightOnly<E, Bits, Group, Offsets>, int rows, int cols, const PanelPiece& p,
                     void* scratch) {
  using F = WeightOnly<E, Bits, Group, Offsets>;
  constexpr int kBlocks = kPieceDepth / kWeightBlock<F>;
  const uint8_t* panel = reinterpret_cast<const uint8_t*>(p.panel);
  E* unpacked = static_cast<E*>(scratch);
  float* wide = reinterpret_cast<float*>(static_cast<char*>(scratch) + kUnpackedBytes);
  float sums[Offsets ? kRowBlock * kBlocks : 1];
  PanelPiece piece = p;
  for (piece.k = p.k; piece.k < p.k + p.depth; piece.k += kPieceDepth) {
    piece.depth = std::min(kPieceDepth, p.k + p.depth - piece.k);
    int64_t lda = p.pitch / int64_t{sizeof(E)};
    const Operand<E>* a =
        operands(rows, reinterpret_cast<const E*>(p.a) + piece.k, piece.depth, &lda, wide);
    if constexpr (Offsets)
      for (int r = 0; r < rows; ++r) sum_blocks<F>(a + r * lda, piece.depth, sums + r * kBlocks);
    if constexpr (kFewRegisters) {  // from one row on: taking codes apart costs most
      static_assert(kPieceDepth * kLanes * sizeof(float) == kReadyBytes);
      float* ready = static_cast<float*>(scratch);
      PanelPiece columns = piece;
      for (int j = 0; j < cols; ++j, columns.c += kLanes, columns.col += kLanes) {
        unpack_piece<F, kLanes>(panel, piece.k, piece.depth, columns.col, 1, p.next, ready);
        panel_rows(rows, 1, ScaledTile<F, ReadyNumbers>{columns, a, lda, sums, {ready}});
      }
      continue;
    }
    if constexpr (kCodesInRegisters<E>) {
      if (rows <= TileShape<int8_t>::kRows) {
        using Source = CodesAsTheyCome<F>;
        panel_rows(
            rows, cols,
            ScaledTile<F, Source>{piece, a, lda, sums, {panel, piece.k, p.col}, Ahead(p.next)});
        continue;
      }
    }
    unpack_piece<F>(panel, piece.k, piece.depth, p.col, cols, p.next, unpacked);
    panel_rows(rows, cols, ScaledTile<F, UnpackedPiece<F>>{piece, a, lda, sums, {unpacked}});
  }
}

}  // namespace sl
