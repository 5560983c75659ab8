// AVX2 + FMA: Vec is two ymm, low lanes first. bf16 pairs are widened by shift and mask.
#pragma once
#include <immintrin.h>

#include "sinterlm/args.h"

namespace sl {

struct Vec {
  __m256 lo, hi;
};

SL_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SL_INLINE Vec set1(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
SL_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SL_INLINE void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
SL_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
SL_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
SL_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
SL_INLINE Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
SL_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
SL_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
SL_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
SL_INLINE Vec round_nearest(Vec v) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.lo, mode), _mm256_round_ps(v.hi, mode)};
}
SL_INLINE __m256 scale_pow2_half(__m256 v, __m256 n) {
  // Two steps, so that 2^n stays a normal number for any n in [-252, 252].
  const __m256i e = _mm256_cvtps_epi32(n);
  const __m256i e1 = _mm256_srai_epi32(e, 1);
  const __m256i e2 = _mm256_sub_epi32(e, e1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 s1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e1, bias), 23));
  const __m256 s2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e2, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(v, s1), s2);
}
SL_INLINE Vec scale_pow2(Vec v, Vec n) {
  return {scale_pow2_half(v.lo, n.lo), scale_pow2_half(v.hi, n.hi)};
}
SL_INLINE Vec zero_below(Vec v, Vec x, float limit) {
  const __m256 l = _mm256_set1_ps(limit);
  return {_mm256_and_ps(v.lo, _mm256_cmp_ps(x.lo, l, _CMP_NLT_UQ)),
          _mm256_and_ps(v.hi, _mm256_cmp_ps(x.hi, l, _CMP_NLT_UQ))};
}
SL_INLINE Vec keep_lanes(Vec v, int first, int last, Vec other) {
  const __m256i f = _mm256_set1_epi32(first), l = _mm256_set1_epi32(last);
  const __m256i i0 = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i i1 = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
  const auto pick = [&](__m256 a, __m256 b, __m256i i) {
    const __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(f, i), _mm256_cmpgt_epi32(l, i));
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(in));
  };
  return {pick(v.lo, other.lo, i0), pick(v.hi, other.hi, i1)};
}
// The same tree as AVX-512: halves, quarters, pairs.
SL_INLINE float reduce_add(Vec v) {
  const __m256 h = _mm256_add_ps(v.lo, v.hi);
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 p = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(p, _mm_shuffle_ps(p, p, 1)));
}
SL_INLINE float reduce_max(Vec v) {
  const __m256 h = _mm256_max_ps(v.lo, v.hi);
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 p = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(p, _mm_shuffle_ps(p, p, 1)));
}

SL_INLINE __m256 widen_half(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
SL_INLINE Vec load_elems(const bf16* p) { return {widen_half(p), widen_half(p + 8)}; }
SL_INLINE __m256 widen_half(const code8* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
SL_INLINE Vec load_elems(const code8* p) { return {widen_half(p), widen_half(p + 8)}; }
SL_INLINE __m256i narrow_half(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rne = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 out = _mm256_blendv_ps(_mm256_castsi256_ps(rne), _mm256_castsi256_ps(quiet),
                                      _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_castps_si256(out), 16);
}
SL_INLINE void store_elems(bf16* p, Vec v) {
  const __m256i packed = _mm256_packus_epi32(narrow_half(v.lo), narrow_half(v.hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}

template <class E>
struct Panel;

template <>
struct Panel<float> {
  static constexpr int kParts = 1;
  Vec b;
  SL_INLINE Panel load(const float* p, int = 0) { return {sl::load(p)}; }
  SL_INLINE Vec mac(Vec acc, const float* a, const Panel& w) { return fma(set1(*a), w.b, acc); }
};

template <>
struct Panel<bf16> {
  static constexpr int kParts = 2;
  Vec b;
  SL_INLINE Panel load(const bf16* p, int part) {
    const __m256i l = _mm256_loadu_si256((const __m256i*)p);
    const __m256i h = _mm256_loadu_si256((const __m256i*)(p + 16));
    const __m256i mask = _mm256_set1_epi32(int(0xffff0000u));
    const auto widen = [&](__m256i pairs) {
      return _mm256_castsi256_ps(part ? _mm256_and_si256(pairs, mask)
                                      : _mm256_slli_epi32(pairs, 16));
    };
    return {{widen(l), widen(h)}};
  }
  SL_INLINE Vec mac(Vec acc, const float* a, const Panel& w) { return fma(set1(*a), w.b, acc); }
};
constexpr bool kBf16Dots = false;

// Columns of weights are made ready (ready.h), and a tile that scales its sums block after block
// leaves its outputs in memory meanwhile.
constexpr bool kFewRegisters = true;

// Rows of the register tile, and columns (of 16) for so many rows: few rows take more columns, so
// that a panel is read as it lies in memory.
template <class E>
struct TileShape {
  static constexpr int kRows = 4;
  static constexpr int cols(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
};
template <>
struct TileShape<bf16> : TileShape<void> {  // 10 sums, two halves of a step, mask and operand
  static constexpr int kRows = 5;
};
template <>
struct TileShape<float> {  // 12 sums, one step of 16 columns, one operand: all 16 registers
  static constexpr int kRows = 6;
  static constexpr int cols(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
};
template <>
struct TileShape<code8> : TileShape<float> {};

}  // namespace sl
