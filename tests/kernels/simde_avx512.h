// AVX-512 intrinsics as SIMDe's functions, for machines that lack the instructions: included before
// all else in a build with AVX2's flags and the macro of an AVX-512 level. What SIMDe 0.7.4 lacks
// is written here lane by lane, from the instructions' definition.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

namespace emulated {

// To[i] = fn(From[i]) for N lanes, in registers of the types Out and In.
template <class Out, class To, class From, int N, class In, class Fn>
inline Out lanes(In v, Fn fn) {
  From from[N];
  To to[N];
  Out out;
  static_assert(sizeof from == sizeof v && sizeof to == sizeof out);
  std::memcpy(from, &v, sizeof v);
  for (int i = 0; i < N; ++i) to[i] = fn(from[i]);
  std::memcpy(&out, to, sizeof out);
  return out;
}

// To nearest even, the state that workers run in.
inline int32_t nearest(float v) { return static_cast<int32_t>(std::nearbyint(v)); }

inline uint16_t bf16_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (v != v) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;  // denormals count as zero
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float half_value(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }

inline __m512 shuffle_f32x4(__m512 a, __m512 b, int pick) {
  float x[16], y[16], out[16];
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  for (int part = 0; part < 4; ++part)
    std::memcpy(out + 4 * part, (part < 2 ? x : y) + 4 * (pick >> 2 * part & 3), 16);
  std::memcpy(&a, out, 64);
  return a;
}

inline float no_denormal(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? 0 * v : v; }

inline float bf16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float v;
  std::memcpy(&v, &wide, 4);
  return no_denormal(v);
}

// SIMDe adds the even products first; the instruction begins with the odd ones, each an fma.
template <class Pairs>
inline __m512 dpbf16(__m512 sums, Pairs a, Pairs b) {
  uint16_t x[32], y[32];
  float out[16];
  static_assert(sizeof x == sizeof a && sizeof out == sizeof sums);
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  std::memcpy(out, &sums, 64);
  for (int i = 0; i < 32; ++i) {
    float& sum = out[i / 2];
    sum = no_denormal(std::fma(bf16_value(x[i ^ 1]), bf16_value(y[i ^ 1]), no_denormal(sum)));
  }
  std::memcpy(&sums, out, 64);
  return sums;
}

inline float reduce_max(__m512 v) {
  float x[16];
  std::memcpy(x, &v, 64);
  float top = x[0];
  for (float f : x) top = f > top ? f : top;
  return top;
}

}  // namespace emulated

#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(sums, a, b) emulated::dpbf16(sums, a, b)

// SIMDe gives this name the parameters of the masked one.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#define _mm512_shuffle_f32x4(a, b, pick) emulated::shuffle_f32x4(a, b, pick)
#define _mm512_reduce_max_ps(v) emulated::reduce_max(v)
#define _mm512_cvtps_epi32(v) \
  emulated::lanes<__m512i, int32_t, float, 16>(v, [](float x) { return emulated::nearest(x); })
#define _mm512_cvtepi32_ps(v) \
  emulated::lanes<__m512, float, int32_t, 16>(v, [](int32_t x) { return static_cast<float>(x); })
#define _mm512_cvtepi32_epi16(v) \
  emulated::lanes<__m256i, int16_t, int32_t, 16>(v, [](int32_t x) { return int16_t(x); })
#define _mm512_cvtepi32_epi8(v) \
  emulated::lanes<__m128i, int8_t, int32_t, 16>(v, [](int32_t x) { return int8_t(x); })
#define _mm512_cvtepu16_epi32(v) \
  emulated::lanes<__m512i, uint32_t, uint16_t, 16>(v, [](uint16_t x) { return uint32_t{x}; })
#define _mm512_cvtph_ps(v)                        \
  emulated::lanes<__m512, float, uint16_t, 16>(v, \
                                               [](uint16_t h) { return emulated::half_value(h); })
#define _mm512_cvtneps_pbh(v) \
  emulated::lanes<__m256i, uint16_t, float, 16>(v, [](float x) { return emulated::bf16_bits(x); })
