// sl_probe: the two roofs of this machine, measured with the model's own workers.
#pragma once
#include "sinterlm/describe.h"
#include "sinterlm/matmul.h"

namespace sl {

// Sum of `n` floats (a multiple of 128), eight loads in flight.
inline float sum_floats(const float* p, int64_t n) {
  Vec sum[8];
  for (Vec& v : sum) v = zero();
  for (int64_t i = 0; i < n; i += 8 * kLanes)
    for (int j = 0; j < 8; ++j) sum[j] = add(sum[j], load(p + i + j * kLanes));
  for (int j = 1; j < 8; ++j) sum[0] = add(sum[0], sum[j]);
  return reduce_add(sum[0]);
}

template <class E>
constexpr int kTileSums = TileShape<E>::kRows * TileShape<E>::cols(TileShape<E>::kRows);

// The dot product of a format, alone: one step of 16 columns, and the flops of it.
template <class F>
struct DotOf;
template <class T>
struct DotOf<Wide<T>> {
  using E = Operand<T>;                       // what products are computed in
  static constexpr int kSums = kTileSums<E>;  // chains of the register tile
  using Weights = Panel<E>;
  using Sum = Vec;
  static constexpr int kFlops = 2 * kLanes * kPair<E>;
  SL_INLINE Weights load(const void* p) { return Panel<E>::load(static_cast<const E*>(p)); }
  SL_INLINE Sum mac(Sum sum, const void* a, const Weights& w) {
    return Panel<E>::mac(sum, static_cast<const E*>(a), w);
  }
};
template <class E, int Bits, int Group, bool Offsets>
struct DotOf<WeightOnly<E, Bits, Group, Offsets>> : DotOf<Wide<E>> {};
template <int Bits, int Group, bool Offsets, int ActGroup>
struct DotOf<Coded<Bits, Group, Offsets, ActGroup>> : Dot<Bits> {
  static constexpr int kSums = kTileSums<typename Dot<Bits>::Act>;
  static constexpr int kFlops = 2 * kLanes * 32 / Bits / Dot<Bits>::kParts;
  SL_INLINE typename Dot<Bits>::Weights load(const void* p) {
    return Dot<Bits>::load(static_cast<const uint8_t*>(p), 0);
  }
  SL_INLINE typename Dot<Bits>::Sum mac(typename Dot<Bits>::Sum sum, const void* a,
                                        const typename Dot<Bits>::Weights& w) {
    return Dot<Bits>::mac(sum, static_cast<const typename Dot<Bits>::Act*>(a), w);
  }
};

// `rounds` steps of the GEMM's register tile without memory; `operands` are kSpinBytes of zeros,
// and zero comes back. The compiler must not know it: sums that begin alike would be one sum, and
// a product that stays the same would be computed once.
constexpr int kSpinBytes = 4096;
template <class D>
int spin_tile(int rounds, const char* operands) {
  constexpr int kSums = D::kSums, kNext = 8;  // bytes from one sum's activations to the next one's
  typename D::Sum sum[kSums];
  static_assert(sizeof sum <= kSpinBytes && kSums * kNext <= kSpinBytes);
  asm volatile("" : "+r"(operands));
  std::memcpy(sum, operands, sizeof sum);
  const typename D::Weights panel = D::load(operands);
  for (int i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) sum[j] = D::mac(sum[j], operands + j * kNext, panel);
    asm volatile("" : "+r"(operands));
  }
  char bytes[sizeof sum];
  std::memcpy(bytes, sum, sizeof sum);
  int total = 0;
  for (char byte : bytes) total += byte;
  return total;
}

// Rounds of the products that a format is made of, and the flops of one.
template <class F>
struct Spin {
  using D = DotOf<F>;
  static constexpr int kFlops = D::kFlops * D::kSums;
  static int run(int rounds, const char* operands) { return spin_tile<D>(rounds, operands); }
};
#if defined(SL_ISA_AMX)
template <bool kCodes>
struct TileSpin {
  static constexpr int kFlops = 4 * 2 * kTileRows * kLanes * (kCodes ? 2 : 1) * kTileDepth;
  static int run(int rounds, const char* operands) { return spin_tiles<kCodes>(rounds, operands); }
};
template <>
struct Spin<Wide<bf16>> : TileSpin<false> {};
template <int Bits, int Group, bool Offsets, int ActGroup>
struct Spin<Coded<Bits, Group, Offsets, ActGroup>> : TileSpin<true> {};
#endif

// Runs pass(worker) three times or more for about `seconds`; the shortest, in ns.
template <class Pass>
int64_t best_of(Pool& pool, double seconds, Pass&& pass) {
  int64_t best = INT64_MAX;
  const int64_t end = now_ns() + static_cast<int64_t>(seconds * 1e9);
  for (int i = 0; i < 3 || now_ns() < end; ++i) {
    pool.run([&](Worker& w) {
      w.barrier();  // everybody is awake
      const int64_t start = now_ns();
      pass(w);
      w.barrier();
      if (w.id == 0) best = std::min(best, now_ns() - start);
    });
  }
  return best;
}

template <class F>
sl_status probe(Model& m, double seconds, double* gflops, double* gbytes) {
  if (!(seconds >= 0 && seconds <= 60)) return fail(SL_INVALID, "seconds is %g", seconds);
  if (!gflops || !gbytes) return fail(SL_INVALID, "gflops or gbytes is null");
  if (!m.pool->run([](Worker&) {})) return fail(SL_INVALID, "the model was opened before fork()");
  const int64_t bytes = probe_bytes(), piece = int64_t{1} << 20;
  const Arena arena = Arena::zeroed(bytes);
  if (!arena) return fail(SL_NO_MEMORY, "no memory for a probe of %lld bytes", (long long)bytes);
  char* data = static_cast<char*>(arena.data());
  const int pieces = static_cast<int>(bytes / piece);
  std::vector<float> sink(m.pool->count() * 16);
  m.pool->run([&](Worker& w) {
    w.for_each_static(pieces, [&](int i) {  // no two pages alike: a host may share equal ones
      float* p = reinterpret_cast<float*>(data + i * piece);
      for (int64_t j = 0; j < piece / 4; ++j) p[j] = static_cast<float>(i + j);
    });
  });
  const int64_t read_ns = best_of(*m.pool, seconds / 2, [&](Worker& w) {
    w.for_each_static(pieces, [&](int i) {
      sink[w.id * 16] += sum_floats(reinterpret_cast<const float*>(data + i * piece), piece / 4);
    });
  });
  constexpr int kRounds = 1 << 16;
  alignas(64) const char operands[kSpinBytes] = {};
  const int64_t dot_ns = best_of(*m.pool, seconds / 2, [&](Worker& w) {
    sink[w.id * 16] += static_cast<float>(Spin<F>::run(kRounds, operands));
  });
  volatile float keep = 0;
  for (float v : sink) keep = keep + v;
  const double flops = double{Spin<F>::kFlops} * kRounds * m.pool->count();
  *gbytes = static_cast<double>(pieces * piece) / static_cast<double>(read_ns);
  *gflops = flops / static_cast<double>(dot_ns);
  return SL_OK;
}

}  // namespace sl
