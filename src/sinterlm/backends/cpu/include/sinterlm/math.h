// exp, log, Gumbel noise and reductions for sampling: vectors that any compiler can cut, no libm
// and no fused multiply-add, so that a draw has the same bits on every machine and ISA level.
//
// Sums run in 16 lanes whatever the width of a register, hence are the same sum everywhere.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "sinterlm/args.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors stay inside inlined functions
#endif

namespace sl {
namespace vm {

#if defined(__AVX2__)
constexpr int W = 8;  // lanes per register
#else
constexpr int W = 4;
#endif
constexpr int kSumLanes = 16;
constexpr int kRegs = kSumLanes / W;

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));

SL_INLINE F all(float v) { return F{} + v; }
SL_INLINE F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SL_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
SL_INLINE F where(I mask, F a, F b) { return (F)(((I)a & mask) | ((I)b & ~mask)); }
SL_INLINE F max(F a, F b) { return where((I)(a > b), a, b); }

// e^x for x <= 88, below -87.3 exactly 0; at most 2 ulp. Cody-Waite reduction and the minimax
// polynomial of the Cephes library's expf.
SL_INLINE F exp(F x) {
  const F magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F bounded = max(x, all(-88.0f));
  const F n = (bounded * 1.44269504f + magic) - magic;
  const F r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const I scale = (__builtin_convertvector(n, I) + 127) << 23;
  return where((I)(x > -87.3f), p * (F)scale, F{});
}

// log(x) for normal x > 0; relative error below 2e-7, near 1 too. The polynomial of Cephes' logf.
SL_INLINE F log(F x) {
  const I bits = (I)x;
  const I e = (bits - 0x3f3504f3) >> 23;  // so that the rest lies in [sqrt(1/2), sqrt(2))
  const F f = (F)(bits - (e << 23)) - 1.0f;
  const F n = __builtin_convertvector(e, F);
  F p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const F z = f * f;
  const F y = (p * f * z - n * 2.12194440e-4f) - z * 0.5f;
  return (f + y) + n * 0.693359375f;
}

// log(x) in double for normal x > 0: 2 atanh((m - 1) / (m + 1)) + e ln 2, to about 1e-16.
inline double log_double(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  const int64_t e = static_cast<int64_t>(bits - 0x3fe6a09e667f3bcdull) >> 52;
  bits -= static_cast<uint64_t>(e) << 52;
  double m;
  std::memcpy(&m, &bits, 8);
  const double s = (m - 1) / (m + 1), z = s * s;
  double p = 0;
  for (int k = 23; k >= 1; k -= 2) p = p * z + 1.0 / k;
  return 2 * s * p + static_cast<double>(e) * 0.69314718055994531;
}

// exp of one number by the vector routine, so that both agree.
inline float exp_one(float x) {
  float lanes[W];
  store(lanes, exp(all(x)));
  return lanes[0];
}

// y[i] = exp(x[i] - shift) for i < n.
inline void exp_shifted(const float* x, int n, float shift, float* y) {
  int i = 0;
  for (; i + W <= n; i += W) store(y + i, exp(load(x + i) - shift));
  for (; i < n; ++i) y[i] = exp_one(x[i] - shift);
}

// Sum of exp(x[i] - shift) over i < n, n <= 4096: 16 lanes of two-level sums.
inline double sum_exp(const float* x, int n, float shift) {
  F total[kRegs] = {};
  for (int i = 0; i < n;) {
    F part[kRegs] = {};
    for (const int stop = i + 16 * kSumLanes; i < n && i < stop; i += kSumLanes) {
      float padded[kSumLanes];
      const float* from = x + i;
      if (n - i < kSumLanes) {
        for (int j = 0; j < kSumLanes; ++j) padded[j] = i + j < n ? x[i + j] : -INFINITY;
        from = padded;
      }
      for (int r = 0; r < kRegs; ++r) part[r] += exp(load(from + r * W) - shift);
    }
    for (int r = 0; r < kRegs; ++r) total[r] += part[r];
  }
  float lanes[kSumLanes];
  std::memcpy(lanes, total, sizeof lanes);
  double sum = 0;
  for (float v : lanes) sum += v;
  return sum;
}

// Largest of x[0..n) (n >= 1), and whether every one is finite. A NaN is never the largest.
inline float max_finite(const float* x, int n, bool* finite) {
  F top = all(-INFINITY);
  I good = ~I{};
  int i = 0;
  for (; i + W <= n; i += W) {
    const F v = load(x + i);
    top = max(v, top);
    good &= (I)(v - v == 0.0f);
  }
  float lane[W];  // halves, quarters, pairs: no branch, and no chain of W
  store(lane, top);
  for (int m = W / 2; m > 0; m /= 2)
    for (int j = 0; j < m; ++j) lane[j] = lane[j] > lane[j + m] ? lane[j] : lane[j + m];
  uint64_t pair[W / 2], all_good = ~uint64_t{0};
  std::memcpy(pair, &good, sizeof pair);
  for (uint64_t p : pair) all_good &= p;
  bool ok = all_good == ~uint64_t{0};
  for (; i < n; ++i) {
    if (x[i] > lane[0]) lane[0] = x[i];
    ok = ok && x[i] - x[i] == 0.0f;
  }
  *finite = ok;
  return lane[0];
}

// First i with x[i] == value; n when there is none.
inline int find_first(const float* x, int n, float value) {
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    bool any = false;
    for (int j = 0; j < 16; ++j) any |= x[i + j] == value;
    if (any) break;
  }
  while (i < n && x[i] != value) ++i;
  return i;
}

// How many of x[0..n) are greater than value.
inline int count_greater(const float* x, int n, float value) {
  I count{};
  int i = 0;
  for (; i + W <= n; i += W) count -= (I)(load(x + i) > value);
  int total = 0;
  for (int j = 0; j < W; ++j) total += count[j];
  for (; i < n; ++i) total += x[i] > value;
  return total;
}

}  // namespace vm

using vm::count_greater;
using vm::exp_one;
using vm::exp_shifted;
using vm::find_first;
using vm::log_double;
using vm::max_finite;
using vm::sum_exp;

// The finaliser of splitmix64.
SL_INLINE uint64_t mix64(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9ull;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Noise of one draw: a function of (seed, position, token id) alone. Adding Gumbel noise to
// log-weights and taking the largest draws from the softmax (the Gumbel-max trick).
class GumbelNoise {
 public:
  GumbelNoise(uint64_t seed, int32_t position)
      : key_(mix64(seed ^ mix64(static_cast<uint64_t>(position) + 0x9E3779B97F4A7C15ull))) {}

  // u in (0, 1), 23 bits and a half, all exact in fp32.
  SL_INLINE float uniform_of(uint64_t key, int32_t id) {
    const uint64_t r = mix64(key + static_cast<uint64_t>(id) * 0xD1B54A32D192ED03ull);
    return (static_cast<float>(static_cast<int32_t>(r >> 41)) + 0.5f) * 0x1p-23f;
  }

  // score[i] += -log(-log(u(id_of(i)))) for i < n, n a multiple of vm::W.
  template <class IdOf>
  void add_to(float* score, int n, IdOf&& id_of) const {
    float u[vm::W];
    for (int i = 0; i < n; i += vm::W) {
      for (int j = 0; j < vm::W; ++j) u[j] = uniform_of(key_, id_of(i + j));
      vm::store(score + i, vm::load(score + i) - vm::log(-vm::log(vm::load(u))));
    }
  }

 private:
  uint64_t key_;
};

}  // namespace sl
