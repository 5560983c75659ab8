// AVX-512: with VNNI a step is one vpdpbusd (two for 4 bits), weights unsigned, activations signed
// and broadcast from memory. Without it, as in dots_avx2.h, twice as wide.
#pragma once
#include "sinterlm/simd.h"

namespace sl {

// Elements are named: g++ 12 keeps arrays of __m512i that integer instructions add to in memory.
typedef int32_t Ints __attribute__((vector_size(64)));

SL_INLINE Ints set1_int(int32_t v) { return (Ints)_mm512_set1_epi32(v); }
SL_INLINE Vec to_floats(Ints v) { return _mm512_cvtepi32_ps((__m512i)v); }
SL_INLINE Vec load_elems(const fp16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}

SL_INLINE void store_codes(int8_t* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
SL_INLINE void store_codes(int16_t* p, Vec v) {
  const __m256i s = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v));
  _mm256_storeu_si256((__m256i*)p, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(s, 0xd8), 0xd8));
}

// Bits [shift, shift + bits) of the 32-bit words of 16 columns.
template <int Bits>
SL_INLINE Vec codes_of(const uint8_t* p, int shift) {
  const __m512i words = _mm512_srl_epi32(_mm512_loadu_si512(p), _mm_cvtsi32_si128(shift));
  return _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32((1 << Bits) - 1)));
}
// Pairs (even[i], odd[i]) side by side, as a step of bf16 panels.
SL_INLINE void store_pairs(bf16* p, Vec even, Vec odd) {
  bf16 e[16], o[16];
  store_elems(e, even);
  store_elems(o, odd);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)e));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)o));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

SL_INLINE __m512i broadcast_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

template <int Bits>
struct Dot;

// Both halves of 64 bytes of 4-bit codes.
struct Nibbles {
  __m512i low, high;
  SL_INLINE Nibbles load(const uint8_t* p) {
    const __m512i bytes = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)};
  }
};

#if defined(SL_ISA_AVX512BF16)

template <>
struct Dot<8> {
  using Act = int8_t;
  using Sum = Ints;
  using Weights = __m512i;
  static constexpr int kRun = 1 << 16;
  SL_INLINE Weights load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  SL_INLINE Sum begin(Ints total) { return total; }
  SL_INLINE Ints fold(Ints, Sum sum) { return sum; }
  SL_INLINE Sum mac(Sum sum, const Act* a, const Weights& w) {
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, w, broadcast_word(a));
  }
};

template <>
struct Dot<4> {
  using Act = int8_t;
  using Sum = Ints;
  using Weights = Nibbles;
  static constexpr int kRun = 1 << 16;
  SL_INLINE Weights load(const uint8_t* p) { return Nibbles::load(p); }
  SL_INLINE Sum begin(Ints total) { return total; }
  SL_INLINE Ints fold(Ints, Sum sum) { return sum; }
  SL_INLINE Sum mac(Sum sum, const Act* a, const Weights& w) {
    const __m512i low = _mm512_dpbusd_epi32((__m512i)sum, w.low, broadcast_word(a));
    return (Sum)_mm512_dpbusd_epi32(low, w.high, broadcast_word(a + 4));
  }
};

#else

template <>
struct Dot<8> {
  using Act = int16_t;
  using Sum = Ints;
  static constexpr int kRun = 1 << 16;
  struct Weights {
    __m512i even, odd;
  };
  SL_INLINE Weights load(const uint8_t* p) {
    const __m512i bytes = _mm512_loadu_si512(p);
    return {_mm512_and_si512(bytes, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(bytes, 8)};
  }
  SL_INLINE Sum begin(Ints total) { return total; }
  SL_INLINE Ints fold(Ints, Sum sum) { return sum; }
  SL_INLINE Sum mac(Sum sum, const Act* a, const Weights& w) {
    sum += (Sum)_mm512_madd_epi16(w.even, broadcast_word(a));
    return sum + (Sum)_mm512_madd_epi16(w.odd, broadcast_word(a + 2));
  }
};

template <>
struct Dot<4> {
  using Act = int8_t;
  typedef int16_t Sum __attribute__((vector_size(64)));
  using Weights = Nibbles;
  static constexpr int kRun = 4;
  SL_INLINE Weights load(const uint8_t* p) { return Nibbles::load(p); }
  SL_INLINE Sum begin(Ints) { return Sum{}; }
  SL_INLINE Ints fold(Ints total, Sum sum) {
    return total + (Ints)_mm512_madd_epi16((__m512i)sum, _mm512_set1_epi16(1));
  }
  SL_INLINE Sum mac(Sum sum, const Act* a, const Weights& w) {
    sum += (Sum)_mm512_maddubs_epi16(w.low, broadcast_word(a));
    return sum + (Sum)_mm512_maddubs_epi16(w.high, broadcast_word(a + 4));
  }
};

#endif

}  // namespace sl
