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

// `rounds` steps of the GEMM's register tile without memory; returns something to keep.
template <class E>
float spin_tile(int rounds, const E* operands) {
  constexpr int kSums = kTileRows * kTileCols;
  Vec sum[kSums];
  for (Vec& v : sum) v = zero();
  const Panel<E> panel = Panel<E>::load(operands);
  for (int i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) sum[j] = Panel<E>::mac(sum[j], operands, panel);
  }
  for (int j = 1; j < kSums; ++j) sum[0] = add(sum[0], sum[j]);
  return reduce_add(sum[0]);
}

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

template <class E>
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
  const E operands[kLanes * kPair<E>] = {};
  const int64_t dot_ns = best_of(
      *m.pool, seconds / 2, [&](Worker& w) { sink[w.id * 16] += spin_tile<E>(kRounds, operands); });
  volatile float keep = 0;
  for (float v : sink) keep = keep + v;
  const double flops = 2.0 * kRounds * kTileRows * kTileCols * kLanes * kPair<E> * m.pool->count();
  *gbytes = static_cast<double>(pieces * piece) / static_cast<double>(read_ns);
  *gflops = flops / static_cast<double>(dot_ns);
  return SL_OK;
}

}  // namespace sl
