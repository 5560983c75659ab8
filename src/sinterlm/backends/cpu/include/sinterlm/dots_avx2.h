// AVX2 has no exact byte dot product: vpmaddubsw saturates from 8-bit codes. So 8-bit codes are
// widened to 16 bits, even and odd bytes apart, and meet activations stored as int16 in that order
// (0 2 1 3). 4-bit codes cannot saturate, and 32 k of their products fit 16 bits.
#pragma once
#include "sinterlm/simd.h"

namespace sl {

struct Ints {
  __m256i lo, hi;
};

SL_INLINE Ints set1_int(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
SL_INLINE Vec to_floats(Ints v) { return {_mm256_cvtepi32_ps(v.lo), _mm256_cvtepi32_ps(v.hi)}; }
SL_INLINE Vec load_elems(const fp16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}

SL_INLINE __m256i to_shorts(Vec v) {
  const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
SL_INLINE void store_codes(int8_t* p, Vec v) {
  const __m256i shorts = to_shorts(v);
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(shorts, shorts), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(bytes));
}
SL_INLINE void store_codes(int16_t* p, Vec v) {
  const __m256i s = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(to_shorts(v), 0xd8), 0xd8);
  _mm256_storeu_si256((__m256i*)p, s);
}

// Bits [shift, shift + bits) of the 32-bit words of 16 columns.
template <int Bits>
SL_INLINE Vec codes_of(const uint8_t* p, int shift) {
  const __m256i mask = _mm256_set1_epi32((1 << Bits) - 1);
  const __m128i by = _mm_cvtsi32_si128(shift);
  const auto pick = [&](const uint8_t* q) {
    const __m256i words = _mm256_loadu_si256((const __m256i*)q);
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(words, by), mask));
  };
  return {pick(p), pick(p + 32)};
}
// Pairs (even[i], odd[i]) side by side, as a step of bf16 panels.
SL_INLINE void store_pairs(bf16* p, Vec even, Vec odd) {
  const auto join = [](__m256 e, __m256 o) {
    return _mm256_or_si256(narrow_half(e), _mm256_slli_epi32(narrow_half(o), 16));
  };
  _mm256_storeu_si256((__m256i*)p, join(even.lo, odd.lo));
  _mm256_storeu_si256((__m256i*)(p + 16), join(even.hi, odd.hi));
}

SL_INLINE __m256i broadcast_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

template <int Bits>
struct Dot;

template <>
struct Dot<8> {
  using Act = int16_t;
  using Sum = Ints;
  static constexpr int kRun = 1 << 16;
  struct Weights {
    Ints even, odd;
  };
  SL_INLINE Weights load(const uint8_t* p) {
    const __m256i l = _mm256_loadu_si256((const __m256i*)p);
    const __m256i h = _mm256_loadu_si256((const __m256i*)(p + 32));
    const __m256i mask = _mm256_set1_epi16(0xff);
    return {{_mm256_and_si256(l, mask), _mm256_and_si256(h, mask)},
            {_mm256_srli_epi16(l, 8), _mm256_srli_epi16(h, 8)}};
  }
  SL_INLINE Sum begin(Ints total) { return total; }
  SL_INLINE Ints fold(Ints, Sum sum) { return sum; }
  SL_INLINE Sum mac(Sum sum, const Act* a, const Weights& w) {
    const __m256i e = broadcast_word(a), o = broadcast_word(a + 2);
    sum.lo = _mm256_add_epi32(sum.lo, _mm256_madd_epi16(w.even.lo, e));
    sum.hi = _mm256_add_epi32(sum.hi, _mm256_madd_epi16(w.even.hi, e));
    sum.lo = _mm256_add_epi32(sum.lo, _mm256_madd_epi16(w.odd.lo, o));
    sum.hi = _mm256_add_epi32(sum.hi, _mm256_madd_epi16(w.odd.hi, o));
    return sum;
  }
};

template <>
struct Dot<4> {
  using Act = int8_t;
  using Sum = Ints;  // of 16-bit numbers
  static constexpr int kRun = 4;
  struct Weights {
    Ints low, high;
  };
  SL_INLINE Weights load(const uint8_t* p) {
    const __m256i l = _mm256_loadu_si256((const __m256i*)p);
    const __m256i h = _mm256_loadu_si256((const __m256i*)(p + 32));
    const __m256i mask = _mm256_set1_epi8(15);
    return {{_mm256_and_si256(l, mask), _mm256_and_si256(h, mask)},
            {_mm256_and_si256(_mm256_srli_epi16(l, 4), mask),
             _mm256_and_si256(_mm256_srli_epi16(h, 4), mask)}};
  }
  SL_INLINE Sum begin(Ints) { return set1_int(0); }
  SL_INLINE Ints fold(Ints total, Sum sum) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(total.lo, _mm256_madd_epi16(sum.lo, ones)),
            _mm256_add_epi32(total.hi, _mm256_madd_epi16(sum.hi, ones))};
  }
  SL_INLINE Sum mac(Sum sum, const Act* a, const Weights& w) {
    const __m256i a0 = broadcast_word(a), a1 = broadcast_word(a + 4);
    sum.lo = _mm256_add_epi16(sum.lo, _mm256_maddubs_epi16(w.low.lo, a0));
    sum.hi = _mm256_add_epi16(sum.hi, _mm256_maddubs_epi16(w.low.hi, a0));
    sum.lo = _mm256_add_epi16(sum.lo, _mm256_maddubs_epi16(w.high.lo, a1));
    sum.hi = _mm256_add_epi16(sum.hi, _mm256_maddubs_epi16(w.high.hi, a1));
    return sum;
  }
};

}  // namespace sl
