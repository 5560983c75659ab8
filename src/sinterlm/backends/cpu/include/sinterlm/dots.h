// Integer dot products of 16 columns, and what surrounds them: codes stored, unpacked, scaled.
//
// Dot<Bits> is one level's way to multiply unsigned weight codes by signed activation codes:
//   Act      how an activation code is stored
//   Weights  one of the kParts of a step of 16 columns: 4 k of 8 bits or 8 k of 4 bits, 64 bytes
//   Sum      running sums; after kRun steps they must be folded into 16 int32
// All levels give the same integers.
#pragma once
#include <algorithm>
#include <type_traits>

#include "sinterlm/simd.h"

namespace sl {

// Whether CodePairs<Bits, Centred> is there: panels of E from codes, made in registers.
template <class E>
constexpr bool kCodesInRegisters = std::is_same_v<E, bf16> && kBf16Dots;
template <int Bits, bool Centred>
struct CodePairs;

struct fp16 {
  uint16_t bits;
};

// fp16 to fp32, exactly: the exponent is rebased by a multiplication, which also settles
// subnormals; infinity and NaN keep their meaning.
SL_INLINE float to_float(fp16 h) {
  const uint32_t wide = (h.bits & 0x7fffu) << 13;
  float out;
  std::memcpy(&out, &wide, 4);
  out *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &out, 4);
  if ((h.bits & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= (h.bits & 0x8000u) << 16;
  std::memcpy(&out, &bits, 4);
  return out;
}

}  // namespace sl

#if defined(SL_ISA_AVX512BF16) || defined(SL_ISA_AVX512)
#include "sinterlm/dots_avx512.h"
#elif defined(SL_ISA_AVX2)
#include "sinterlm/dots_avx2.h"
#else
#include "sinterlm/dots_generic.h"
#endif

namespace sl {

// 16 columns of one step of codes, less their centre or as they are, as panels of E: what belongs
// to the next P k lies `step` elements on.
template <int Bits, bool Centred>
inline void unpack_codes(const uint8_t* codes, float* out, int step) {
  const Vec centre = set1(Centred ? float{1 << (Bits - 1)} : 0.0f);
#pragma GCC unroll 8
  for (int k = 0; k < 32 / Bits; ++k)
    store(out + k * step, sub(codes_of<Bits>(codes, 8 * (k % 4) + 4 * (k / 4)), centre));
}
template <int Bits, bool Centred>
inline void unpack_codes(const uint8_t* codes, bf16* out, int step) {
  if constexpr (kCodesInRegisters<bf16>) {
    CodePairs<Bits, Centred>::load(codes).store(out, step);
  } else {
    float wide[32 / Bits * kLanes];
    unpack_codes<Bits, Centred>(codes, wide, kLanes);
    for (int k = 0; k < 32 / Bits; k += 2)
      store_pairs(out + k / 2 * step, load(wide + k * kLanes), load(wide + (k + 1) * kLanes));
  }
}

}  // namespace sl
