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

// One step of codes as pairs of bf16, (k, k + 1) side by side. 4 bits: byte i holds k = i and,
// above it, k = i + 4. A byte in each half of a word makes the index of a table of 16 numbers,
// repeated since its fifth bit is a neighbour's.
template <bool Centred>
struct CodePairs<4, Centred> {
  __m512i pairs[4];
  SL_INLINE CodePairs load(const uint8_t* p) {
    const __m512i bytes = _mm512_loadu_si512(p), table = numbers();
    const __m512i low = _mm512_shuffle_epi8(bytes, halves(0)),
                  high = _mm512_shuffle_epi8(bytes, halves(2));
    return {{_mm512_permutexvar_epi16(low, table), _mm512_permutexvar_epi16(high, table),
             _mm512_permutexvar_epi16(_mm512_srli_epi16(low, 4), table),
             _mm512_permutexvar_epi16(_mm512_srli_epi16(high, 4), table)}};
  }
  void store(bf16* out, int step) const {
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(out + i * step, pairs[i]);
  }

 private:
  // Bytes first and first + 1 of every word of 32 bits, each in 16 bits.
  SL_INLINE __m512i halves(int first) {
    const int32_t of_word = int32_t(0x80008000u) | (first + 1) << 16 | first;
    return _mm512_add_epi32(
        _mm512_set1_epi32(of_word),
        _mm512_broadcast_i32x4(_mm_set_epi32(0x000c000c, 0x00080008, 0x00040004, 0)));
  }
  // 0 .. 15, or -8 .. 7, as bf16, twice.
  SL_INLINE __m512i numbers() {
    const __m512i lane =
        _mm512_and_si512(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                         _mm512_set1_epi32(15));
    const Vec wide = _mm512_cvtepi32_ps(_mm512_sub_epi32(lane, _mm512_set1_epi32(Centred ? 8 : 0)));
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(wide);
    return _mm512_broadcast_i64x4(half);
  }
};

// 8 bits: through fp32, as the last bits of 2^23 + code; what is left once that is taken away has a
// lower half of zeros.
template <bool Centred>
struct CodePairs<8, Centred> {
  __m512i pairs[2];
  SL_INLINE CodePairs load(const uint8_t* p) {
    const __m512i codes = _mm512_loadu_si512(p);
    return {{join(number(codes), number(_mm512_srli_epi32(codes, 8))),
             join(number(_mm512_srli_epi32(codes, 16)), number(_mm512_srli_epi32(codes, 24)))}};
  }
  void store(bf16* out, int step) const {
    for (int i = 0; i < 2; ++i) _mm512_storeu_si512(out + i * step, pairs[i]);
  }

 private:
  SL_INLINE __m512i number(__m512i codes) {  // of the lowest byte; 0xea: (a & b) | c
    const __m512i bits = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32(0xff),
                                                   _mm512_set1_epi32(0x4b000000), 0xea);
    const float none = 0x1p23f + (Centred ? 128 : 0);
    return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(none)));
  }
  SL_INLINE __m512i join(__m512i even, __m512i odd) {
    return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
  }
};

template <>
struct Dot<8> {
  using Act = int8_t;
  using Sum = Ints;
  using Weights = __m512i;
  static constexpr int kRun = 1 << 16, kParts = 1;
  SL_INLINE Weights load(const uint8_t* p, int = 0) { return _mm512_loadu_si512(p); }
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
  static constexpr int kRun = 1 << 16, kParts = 1;
  SL_INLINE Weights load(const uint8_t* p, int = 0) { return Nibbles::load(p); }
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
  static constexpr int kRun = 1 << 16, kParts = 1;
  struct Weights {
    __m512i even, odd;
  };
  SL_INLINE Weights load(const uint8_t* p, int = 0) {
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
  static constexpr int kRun = 4, kParts = 1;
  SL_INLINE Weights load(const uint8_t* p, int = 0) { return Nibbles::load(p); }
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
