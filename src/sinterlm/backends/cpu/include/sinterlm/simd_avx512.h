// AVX-512: Vec is one zmm. With AVX512_BF16 a pair product is one vdpbf16ps; without it, the pair
// is widened by shifting (even element) and masking (odd element) and takes two fmas.
#pragma once
#include <immintrin.h>

#include "sinterlm/args.h"

namespace sl {

using Vec = __m512;

SL_INLINE Vec zero() { return _mm512_setzero_ps(); }
SL_INLINE Vec set1(float v) { return _mm512_set1_ps(v); }
SL_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
SL_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
SL_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
SL_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
SL_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
SL_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
SL_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
SL_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
SL_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
SL_INLINE Vec round_nearest(Vec v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SL_INLINE Vec scale_pow2(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }
// v where x >= limit, else 0.
SL_INLINE Vec zero_below(Vec v, Vec x, float limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), v);
}
// v in lanes [first, last), `other` elsewhere.
SL_INLINE Vec keep_lanes(Vec v, int first, int last, Vec other) {
  const uint32_t below = last >= 16 ? 0xffffu : last <= 0 ? 0u : (1u << last) - 1;
  const uint32_t skip = first <= 0 ? 0u : first >= 16 ? 0xffffu : (1u << first) - 1;
  return _mm512_mask_mov_ps(other, static_cast<__mmask16>(below & ~skip), v);
}
// Fixed tree: halves, quarters, pairs.
SL_INLINE float reduce_add(Vec v) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v),
                                 _mm512_castps512_ps256(_mm512_shuffle_f32x4(v, v, 0x4e)));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 p = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(p, _mm_shuffle_ps(p, p, 1)));
}
SL_INLINE float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }

SL_INLINE Vec load_elems(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
SL_INLINE Vec load_elems(const code8* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

#if defined(SL_ISA_AVX512BF16)
SL_INLINE void store_elems(bf16* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
}
#else
SL_INLINE void store_elems(bf16* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rne = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i out = _mm512_mask_mov_epi32(rne, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16)));
}
#endif

// A GEMM step: load(p, part) gives one of the kParts of a step of 16 columns, mac() adds the
// broadcast operand of that part times it.
template <class E>
struct Panel;

template <>
struct Panel<float> {
  static constexpr int kParts = 1;
  __m512 b;
  SL_INLINE Panel load(const float* p, int = 0) { return {_mm512_loadu_ps(p)}; }
  SL_INLINE Vec mac(Vec acc, const float* a, const Panel& w) {
    return _mm512_fmadd_ps(_mm512_set1_ps(*a), w.b, acc);
  }
};

#if defined(SL_ISA_AVX512BF16)
template <>
struct Panel<bf16> {
  static constexpr int kParts = 1;
  __m512i b;
  SL_INLINE Panel load(const bf16* p, int = 0) { return {_mm512_loadu_si512(p)}; }
  SL_INLINE Vec mac(Vec acc, const bf16* a, const Panel& w) {
    int32_t pair;
    __builtin_memcpy(&pair, a, 4);
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w.b);
  }
};
constexpr bool kBf16Dots = true;
#else
template <>
struct Panel<bf16> {
  static constexpr int kParts = 2;
  __m512 b;
  SL_INLINE Panel load(const bf16* p, int part) {
    const __m512i pairs = _mm512_loadu_si512(p);
    const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
    return {
        _mm512_castsi512_ps(part ? _mm512_and_si512(pairs, high) : _mm512_slli_epi32(pairs, 16))};
  }
  SL_INLINE Vec mac(Vec acc, const float* a, const Panel& w) {
    return _mm512_fmadd_ps(_mm512_set1_ps(*a), w.b, acc);
  }
};
constexpr bool kBf16Dots = false;
#endif

constexpr bool kFewRegisters = false;  // panels are multiplied as they lie: see simd_avx2.h

// Rows and columns (of 16) of the register tile: 24 sums, 4 weights, operands from memory.
template <class E>
struct TileShape {
  static constexpr int kRows = 6;
  static constexpr int cols(int) { return 4; }
};
// Against codes: 12 integer sums and the 12 outputs that they are scaled into, block after block.
template <>
struct TileShape<int8_t> {
  static constexpr int kRows = 6;
  static constexpr int cols(int rows) { return rows <= 3 ? 4 : 2; }
};
template <>
struct TileShape<int16_t> : TileShape<int8_t> {};

}  // namespace sl
