// Whether this CPU and its operating system run what this library was compiled to.
#pragma once
#include "sinterlm/simd.h"
#include "sinterlm/tile_state.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sl {

#if defined(__x86_64__) && !defined(SL_ISA_GENERIC)

// The first instruction set that is missing, or null. CPUID bits as in Intel's manual, volume 2A.
inline const char* missing_feature() {
  struct Feature {
    const char* name;
    int leaf, subleaf, reg, bit;  // reg: 0 = eax, 1 = ebx, 2 = ecx
  };
  static constexpr Feature kFeatures[] = {
      {"fma", 1, 0, 2, 12},         {"f16c", 1, 0, 2, 29},       {"avx2", 7, 0, 1, 5},
      {"bmi2", 7, 0, 1, 8},
#if defined(SL_ISA_AVX512) || defined(SL_ISA_AVX512BF16)
      {"avx512f", 7, 0, 1, 16},     {"avx512dq", 7, 0, 1, 17},   {"avx512bw", 7, 0, 1, 30},
      {"avx512vl", 7, 0, 1, 31},
#endif
#if defined(SL_ISA_AVX512BF16)
      {"avx512_vnni", 7, 0, 2, 11}, {"avx512_bf16", 7, 1, 0, 5},
#endif
#if defined(SL_ISA_AMX)
      {"amx_tile", 7, 0, 3, 24},    {"amx_bf16", 7, 0, 3, 22},   {"amx_int8", 7, 0, 3, 25},
#endif
  };
  unsigned r[4];
  if (!__get_cpuid(1, &r[0], &r[1], &r[2], &r[3]) || !(r[2] >> 27 & 1)) return "osxsave";
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  for (const Feature& f : kFeatures) {
    if (!__get_cpuid_count(f.leaf, f.subleaf, &r[0], &r[1], &r[2], &r[3])) return f.name;
    if (!(r[f.reg] >> f.bit & 1)) return f.name;
  }
#if defined(SL_ISA_AVX2)
  constexpr unsigned kSaved = 0x6;  // the system saves xmm and ymm
#elif defined(SL_ISA_AMX)
  constexpr unsigned kSaved = 0x600e6;  // and tiles
#else
  constexpr unsigned kSaved = 0xe6;  // and mask registers and zmm
#endif
  if ((low & kSaved) != kSaved) return "register state kept by the operating system";
  return may_use_tiles() ? nullptr : "the operating system's permission to use AMX";
}

#else
inline const char* missing_feature() { return nullptr; }
#endif

}  // namespace sl
