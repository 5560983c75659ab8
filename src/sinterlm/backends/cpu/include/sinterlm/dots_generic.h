// Plain C++: four multiplications per quad of k, on 16 columns at a time.
#pragma once
#include "sinterlm/simd.h"

namespace sl {

using Ints = IntVec;

SL_INLINE Ints set1_int(int32_t v) { return Ints{} + v; }
SL_INLINE Vec to_floats(Ints v) { return __builtin_convertvector(v, Vec); }
SL_INLINE Vec load_elems(const fp16* p) {
  float v[16];
  for (int i = 0; i < 16; ++i) v[i] = to_float(p[i]);
  return load(v);
}

SL_INLINE void store_codes(int8_t* p, Vec v) {
  const Ints codes = __builtin_convertvector(v, Ints);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(codes[i]);
}

SL_INLINE WordVec load_words(const uint8_t* p) {
  WordVec words;
  __builtin_memcpy(&words, p, 64);
  return words;
}
// Bits [shift, shift + bits) of the 32-bit words of 16 columns.
template <int Bits>
SL_INLINE Vec codes_of(const uint8_t* p, int shift) {
  return to_floats((Ints)(load_words(p) >> static_cast<uint32_t>(shift) & ((1u << Bits) - 1)));
}
// Pairs (even[i], odd[i]) side by side, as a step of bf16 panels.
SL_INLINE void store_pairs(bf16* p, Vec even, Vec odd) {
  bf16 e[16], o[16];
  store_elems(e, even);
  store_elems(o, odd);
  for (int i = 0; i < 16; ++i) p[2 * i] = e[i], p[2 * i + 1] = o[i];
}

// Bits is 8 or 4: a word of 32 bits holds four codes, or the four of one quad below the next.
template <int Bits>
struct Dot {
  using Act = int8_t;
  using Sum = Ints;
  using Weights = WordVec;
  static constexpr int kRun = 1 << 16, kParts = 1;
  SL_INLINE Weights load(const uint8_t* p, int = 0) { return load_words(p); }
  SL_INLINE Sum begin(Ints total) { return total; }
  SL_INLINE Ints fold(Ints, Sum sum) { return sum; }
  SL_INLINE Sum mac(Sum sum, const Act* a, const Weights& w) {
    constexpr uint32_t mask = (1u << Bits) - 1;
    for (uint32_t i = 0; i < 4; ++i)
      for (uint32_t half = 0; half < 8 / Bits; ++half)
        sum += (Ints)(w >> (8 * i + 4 * half) & mask) * int32_t{a[4 * half + i]};
    return sum;
  }
};

}  // namespace sl
