// One logical vector of 16 floats per ISA level, and the few operations that kernels need of it.
//
// Every level gives the same meaning; only dot products differ in their last bits (AMX adds blocks
// of 32 products, AVX512_BF16 rounds after each of its two, the others use fma, generic a product
// and a sum), which is why results are promised per ISA level. Kernels never name an instruction.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "sinterlm/args.h"

#if defined(SL_ISA_AMX)
#define SL_ISA_NAME "amx"
#define SL_ISA_AVX512BF16 1  // and tiles
#include "sinterlm/simd_avx512.h"
#elif defined(SL_ISA_AVX512BF16)
#define SL_ISA_NAME "avx512bf16"
#include "sinterlm/simd_avx512.h"
#elif defined(SL_ISA_AVX512)
#define SL_ISA_NAME "avx512"
#include "sinterlm/simd_avx512.h"
#elif defined(SL_ISA_AVX2)
#define SL_ISA_NAME "avx2"
#include "sinterlm/simd_avx2.h"
#elif defined(SL_ISA_GENERIC)
#define SL_ISA_NAME "generic"
#include "sinterlm/simd_generic.h"
#else
#error "define one of SL_ISA_AMX, SL_ISA_AVX512BF16, SL_ISA_AVX512, SL_ISA_AVX2, SL_ISA_GENERIC"
#endif

namespace sl {

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// fp32 <-> bf16, round to nearest even; NaN stays NaN.
SL_INLINE float to_float(bf16 v) {
  uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
SL_INLINE float to_float(float v) { return v; }

template <class E>
SL_INLINE E from_float(float v);
template <>
inline __attribute__((always_inline)) float from_float<float>(float v) {
  return v;
}
template <>
inline __attribute__((always_inline)) bf16 from_float<bf16>(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40)};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return bf16{static_cast<uint16_t>(bits >> 16)};
}

SL_INLINE Vec load_elems(const float* p) { return load(p); }
SL_INLINE void store_elems(float* p, Vec v) { store(p, v); }

// What a register tile multiplies panels of E with: bf16 where the level has dot products of it and
// panels hold it, else the same numbers in fp32. Codes meet fp32 at every level.
template <class E>
using Operand = std::conditional_t<kBf16Dots && std::is_same_v<E, bf16>, bf16, float>;

// Whether panels of E are multiplied in tiles, of so many k: see tile_amx.h.
constexpr int kTileDepth = 32;
#if defined(SL_ISA_AMX)
template <class E>
constexpr bool kInTiles = std::is_same_v<E, bf16>;
#else
template <class E>
constexpr bool kInTiles = false;
#endif

// 16 numbers of E as operands O.
template <class O, class E>
SL_INLINE void store_operands(O* to, const E* from) {
  if constexpr (std::is_same_v<O, E>)
    std::memcpy(to, from, kLanes * sizeof(E));
  else
    store(to, load_elems(from));
}
// 16 numbers in fp32 as operands beside panels of E: rounded to E, but not beside codes.
template <class E>
SL_INLINE void round_operands(Operand<E>* to, Vec v) {
  if constexpr (kInCodes<E>) {
    store(to, v);
  } else {
    E rounded[kLanes];
    store_elems(rounded, v);
    store_operands(to, rounded);
  }
}

// A step of a panel of codes: widened as it is loaded, then as a panel of fp32.
template <>
struct Panel<code8> {
  static constexpr int kParts = 1;
  Panel<float> b;
  SL_INLINE Panel load(const code8* p, int = 0) { return {{load_elems(p)}}; }
  SL_INLINE Vec mac(Vec acc, const float* a, const Panel& w) {
    return Panel<float>::mac(acc, a, w.b);
  }
};

// e^x, at most 2 ulp: 2^n * p(r) with n = round(x / ln 2), Cody-Waite reduction, and the minimax
// polynomial of the Cephes library's expf. Below -87.3 the result is exactly 0, so masked lanes
// contribute nothing; e^0 is exactly 1.
SL_INLINE Vec exp(Vec x) {
  const Vec n = round_nearest(mul(min(max(x, set1(-88.0f)), set1(88.0f)), set1(1.44269504f)));
  Vec r = fma(n, set1(-0.693359375f), x);  // x itself, so that NaN and +inf pass through
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), set1(1.0f));
  return zero_below(scale_pow2(p, n), x, -87.3f);
}

// x * sigmoid(x)
SL_INLINE Vec silu(Vec x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

}  // namespace sl
