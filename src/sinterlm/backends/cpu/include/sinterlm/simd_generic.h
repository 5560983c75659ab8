// Plain C++ for any CPU, aarch64 included: Vec is a compiler vector of 16 floats, which the
// compiler cuts into whatever the target has. No fused multiply-add: a product and a sum.
#pragma once
#include <cmath>

#include "sinterlm/args.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace sl {

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));

SL_INLINE Vec set1(float v) { return Vec{} + v; }
SL_INLINE Vec zero() { return Vec{}; }
SL_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, 64);
  return v;
}
SL_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, 64); }
SL_INLINE Vec add(Vec a, Vec b) { return a + b; }
SL_INLINE Vec sub(Vec a, Vec b) { return a - b; }
SL_INLINE Vec mul(Vec a, Vec b) { return a * b; }
SL_INLINE Vec div(Vec a, Vec b) { return a / b; }
SL_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
SL_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
SL_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// Valid for |v| < 2^22: adding and taking away 1.5 * 2^23 leaves the nearest integer.
SL_INLINE Vec round_nearest(Vec v) {
  const Vec magic = set1(12582912.0f);
  return (v + magic) - magic;
}
SL_INLINE Vec scale_pow2(Vec v, Vec n) {
  const IntVec e = __builtin_convertvector(n, IntVec);
  const IntVec e1 = e >> 1;
  const IntVec s1 = (e1 + 127) << 23;
  const IntVec s2 = (e - e1 + 127) << 23;
  return v * (Vec)s1 * (Vec)s2;
}
SL_INLINE Vec zero_below(Vec v, Vec x, float limit) {
  const IntVec drop = x < set1(limit);
  return (Vec)((IntVec)v & ~drop);
}
SL_INLINE Vec keep_lanes(Vec v, int first, int last, Vec other) {
  const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const IntVec in = (lane >= first) & (lane < last);
  return (Vec)(((IntVec)v & in) | ((IntVec)other & ~in));
}
SL_INLINE float reduce_add(Vec v) {
  float t[16];
  store(t, v);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) t[i] += t[i + half];
  return t[0];
}
SL_INLINE float reduce_max(Vec v) {
  float t[16];
  store(t, v);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) t[i] = t[i] > t[i + half] ? t[i] : t[i + half];
  return t[0];
}

typedef uint16_t HalfVec __attribute__((vector_size(32)));
typedef uint32_t WordVec __attribute__((vector_size(64)));
typedef int8_t ByteVec __attribute__((vector_size(16)));

SL_INLINE Vec load_elems(const bf16* p) {
  HalfVec h;
  __builtin_memcpy(&h, p, 32);
  return (Vec)(__builtin_convertvector(h, WordVec) << 16);
}
SL_INLINE Vec load_elems(const code8* p) {
  ByteVec codes;
  __builtin_memcpy(&codes, p, 16);
  return __builtin_convertvector(__builtin_convertvector(codes, IntVec), Vec);
}
SL_INLINE void store_elems(bf16* p, Vec v) {
  const WordVec bits = (WordVec)v;
  const WordVec rne = bits + 0x7fffu + ((bits >> 16) & 1u);
  const WordVec nan = (WordVec)(v != v);
  const WordVec out = (rne & ~nan) | ((bits | 0x400000u) & nan);
  const HalfVec h = __builtin_convertvector(out >> 16, HalfVec);
  __builtin_memcpy(p, &h, 32);
}

template <class E>
struct Panel;

template <>
struct Panel<float> {
  static constexpr int kParts = 1;
  Vec b;
  SL_INLINE Panel load(const float* p, int = 0) { return {sl::load(p)}; }
  SL_INLINE Vec mac(Vec acc, const float* a, const Panel& w) { return acc + w.b * *a; }
};

template <>
struct Panel<bf16> {
  static constexpr int kParts = 2;
  Vec b;
  SL_INLINE Panel load(const bf16* p, int part) {
    WordVec w;
    __builtin_memcpy(&w, p, 64);
    return {part ? (Vec)(w & 0xffff0000u) : (Vec)(w << 16)};
  }
  SL_INLINE Vec mac(Vec acc, const float* a, const Panel& w) { return acc + w.b * *a; }
};
constexpr bool kBf16Dots = false;

constexpr bool kFewRegisters = false;  // panels are multiplied as they lie: see simd_avx2.h

template <class E>
struct TileShape {
  static constexpr int kRows = 2;
  static constexpr int cols(int) { return 1; }
};

}  // namespace sl
