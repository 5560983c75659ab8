// Many rows of codes times panels of codes in the tile registers of AMX: the sums of tile_coded.h,
// whose integers are the same, so that few rows may go another way.
#pragma once
#include "sinterlm/tile_amx.h"
#include "sinterlm/tile_coded.h"

namespace sl {

constexpr int kCodeTilesFrom = 9;  // rows: fewer wait for memory, whatever multiplies

template <class F, int C>
class CodesInTiles : CodedTile<F> {
 public:
  explicit CodesInTiles(const PanelPiece& piece) : CodedTile<F>{piece} {}

  // Rows [r0, r1), tiles of `height`, times C x 16 columns: block by block, each for all rows.
  void run(int r0, int r1, int height) const {
    TileState::set({height, height, kDepth / 4});
    const uint8_t* panel = reinterpret_cast<const uint8_t*>(p.panel);
    alignas(64) uint8_t bytes[kPlain ? 1 : F::kBlock * C * kLanes];
    for (int k = p.k, end = p.k + p.depth; k < end; k += F::kBlock) {
      const uint8_t* codes = F::codes_at(panel, k);
      const uint8_t* tail = F::tail(codes, F::group_end(p.K, k) - k);
      const uint8_t* b = codes + p.col * 4;
      TileAhead ahead(reinterpret_cast<const char*>(b) + p.next, F::kStepBytes, 4 * kLanes, C,
                      F::kBlock / F::kStep, (r1 - r0) / height);
      if constexpr (!kPlain) {
        take_apart(b, bytes);
        b = bytes;
      }
      typename CodedTile<F>::Scales scales[C];
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) scales[j] = {tail, p.col + j * kLanes};
      for (int r = r0; r < r1; r += height) {
        ahead.turn();
        alignas(64) int32_t dot[kTileRows][C * kLanes];
        multiply_block(this->row(r) + k, p.pitch, b, dot[0]);
        for (int i = 0; i < height; ++i) {
          const Vec act = set1(this->act_scale(r + i, k));
          const int32_t sum = F::kOffsets ? this->sum(r + i, k) : 0;
          float* c = p.c + (r + i) * p.ldc;
#pragma GCC unroll 4
          for (int j = 0; j < C; ++j, c += kLanes) {
            const Vec floats = to_floats((Ints)_mm512_load_si512(dot[i] + j * kLanes));
            const Vec total = scales[j].add(k > 0 ? load(c) : zero(), floats, act, sum);
            store(c, kOneScale && k + F::kBlock >= p.K ? mul(total, scales[j].scale) : total);
          }
        }
      }
    }
  }

 private:
  using CodedTile<F>::p, CodedTile<F>::kOneScale;
  static constexpr int kDepth = std::min(F::kBlock, 64);  // k of one instruction
  // Whether codes are multiplied as they lie; else as signed bytes less their centre, or none.
  static constexpr bool kPlain = F::kBits == 8 && F::kOffsets;
  static constexpr int kPitch = kPlain ? F::kStepBytes : C * 4 * kLanes;  // bytes per 4 k

  static void take_apart(const uint8_t* b, uint8_t* bytes) {
    const __m512i centre = _mm512_set1_epi8(F::kOffsets ? 0 : static_cast<char>(F::kCentre));
    for (int k = 0; k < F::kBlock; k += F::kStep, b += F::kStepBytes)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j, bytes += 64) {
        if constexpr (F::kBits == 8) {
          _mm512_store_si512(bytes, _mm512_sub_epi8(_mm512_loadu_si512(b + j * 64), centre));
        } else {
          const Nibbles n = Nibbles::load(b + j * 64);
          _mm512_store_si512(bytes, _mm512_sub_epi8(n.low, centre));
          _mm512_store_si512(bytes + kPitch, _mm512_sub_epi8(n.high, centre));
          if (j == C - 1) bytes += kPitch;
        }
      }
  }

#define SL_TILE_DOT(to, weights)  \
  if constexpr (kPlain)           \
    _tile_dpbsud(to, 4, weights); \
  else                            \
    _tile_dpbssd(to, 4, weights)

  // The integer dot products of one block, to[rows][C * 16].
  static void multiply_block(const char* a, long lda, const uint8_t* b, int32_t* to) {
    constexpr long kRow = C * kLanes * 4;
    asm volatile("" ::: "memory");  // as in tile_amx.h
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (C > 2) _tile_zero(2);
    if constexpr (C > 3) _tile_zero(3);
#pragma GCC unroll 4
    for (int k = 0; k < F::kBlock; k += kDepth, a += kDepth, b += kDepth / 4 * kPitch) {
      _tile_loadd(4, a, lda);
      _tile_loadd(6, b, kPitch);
      SL_TILE_DOT(0, 6);
      if constexpr (C > 1) {
        _tile_loadd(7, b + 64, kPitch);
        SL_TILE_DOT(1, 7);
      }
      if constexpr (C > 2) {
        _tile_loadd(6, b + 128, kPitch);
        SL_TILE_DOT(2, 6);
      }
      if constexpr (C > 3) {
        _tile_loadd(7, b + 192, kPitch);
        SL_TILE_DOT(3, 7);
      }
    }
    _tile_stored(0, to, kRow);
    if constexpr (C > 1) _tile_stored(1, to + 16, kRow);
    if constexpr (C > 2) _tile_stored(2, to + 32, kRow);
    if constexpr (C > 3) _tile_stored(3, to + 48, kRow);
    asm volatile("" ::: "memory");
  }
#undef SL_TILE_DOT
};

template <class F, int C = kPanelCols / kLanes>
inline void multiply_coded_tiles(int rows, int cols, const PanelPiece& p) {
  if constexpr (C > 1)
    if (cols < C) return multiply_coded_tiles<F, C - 1>(rows, cols, p);
  const CodesInTiles<F, C> tiles(p);
  const int full = rows / kTileRows * kTileRows;
  if (full > 0) tiles.run(0, full, kTileRows);
  if (full < rows) tiles.run(full, rows, rows - full);
}

}  // namespace sl
