// Integer dot products of 16 columns, and what surrounds them: codes stored, unpacked, scaled.
//
// Dot<Bits> is one level's way to multiply unsigned weight codes by signed activation codes:
//   Act      how an activation code is stored
//   Weights  one step of 16 columns: 4 k of 8 bits or 8 k of 4 bits, 64 bytes
//   Sum      running sums; after kRun steps they must be folded into 16 int32
// All levels give the same integers.
#pragma once
#include <algorithm>
#include <type_traits>

#include "sinterlm/simd.h"

namespace sl {

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
