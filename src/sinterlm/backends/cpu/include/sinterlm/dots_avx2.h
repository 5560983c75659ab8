// AVX2 has no exact byte dot product: vpmaddubsw saturates from 8-bit codes. So 8-bit codes are
// widened to 16 bits, even and odd bytes apart, and meet activations stored as int16 in that order
// (0 2 1 3). 4-bit codes cannot saturate, and 32 k of their products fit 16 bits.
#pragma once
#include "sinterlm/simd.h"

namespace sl {

// Sums have element types: g++ 12 keeps arrays of __m256i that integer instructions add to in
// memory.
typedef int32_t IntHalf __attribute__((vector_size(32)));
typedef int16_t ShortHalf __attribute__((vector_size(32)));
struct Ints {
  IntHalf lo, hi;
};
struct Shorts {  // two to a lane
  ShortHalf lo, hi;
};

SL_INLINE Ints set1_int(int32_t v) { return {IntHalf{} + v, IntHalf{} + v}; }
SL_INLINE Vec to_floats(Ints v) {
  return {_mm256_cvtepi32_ps((__m256i)v.lo), _mm256_cvtepi32_ps((__m256i)v.hi)};
}
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
  const auto pick = [&](const uint8_t* q) {
    const __m256i words = _mm256_loadu_si256((const __m256i*)q);
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(words, shift), mask));
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

// One part of a step of 16 columns, and how it lies where it was made ready (ready.h).
struct Words {
  __m256i lo, hi;
  SL_INLINE Words load(const uint8_t* p) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
  void store(uint8_t* p) const {
    __m256i* halves = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(halves, lo);
    _mm256_storeu_si256(halves + 1, hi);
  }
};

template <>
struct Dot<8> {
  using Act = int16_t;
  using Sum = Ints;
  using Weights = Words;  // even or odd bytes
  static constexpr int kRun = 1 << 16, kParts = 2;
  SL_INLINE Weights load(const uint8_t* p, int part) {
    const Words bytes = Words::load(p);
    if (part) return {_mm256_srli_epi16(bytes.lo, 8), _mm256_srli_epi16(bytes.hi, 8)};
    const __m256i mask = _mm256_set1_epi16(0xff);
    return {_mm256_and_si256(bytes.lo, mask), _mm256_and_si256(bytes.hi, mask)};
  }
  SL_INLINE Sum begin(Ints total) { return total; }
  SL_INLINE Ints fold(Ints, Sum sum) { return sum; }
  SL_INLINE Sum mac(Sum sum, const Act* a, const Weights& w) {
    const __m256i pair = broadcast_word(a);
    return {sum.lo + (IntHalf)_mm256_madd_epi16(w.lo, pair),
            sum.hi + (IntHalf)_mm256_madd_epi16(w.hi, pair)};
  }
};

template <>
struct Dot<4> {
  using Act = int8_t;
  using Sum = Shorts;
  using Weights = Words;  // low or high nibbles
  static constexpr int kRun = 4, kParts = 2;
  SL_INLINE Weights load(const uint8_t* p, int part) {
    Words bytes = Words::load(p);
    if (part) bytes = {_mm256_srli_epi16(bytes.lo, 4), _mm256_srli_epi16(bytes.hi, 4)};
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(bytes.lo, mask), _mm256_and_si256(bytes.hi, mask)};
  }
  SL_INLINE Sum begin(Ints) { return {ShortHalf{}, ShortHalf{}}; }
  SL_INLINE Ints fold(Ints total, Sum sum) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {total.lo + (IntHalf)_mm256_madd_epi16((__m256i)sum.lo, ones),
            total.hi + (IntHalf)_mm256_madd_epi16((__m256i)sum.hi, ones)};
  }
  SL_INLINE Sum mac(Sum sum, const Act* a, const Weights& w) {
    const __m256i quad = broadcast_word(a);
    return {sum.lo + (ShortHalf)_mm256_maddubs_epi16(w.lo, quad),
            sum.hi + (ShortHalf)_mm256_maddubs_epi16(w.hi, quad)};
  }
};

}  // namespace sl
