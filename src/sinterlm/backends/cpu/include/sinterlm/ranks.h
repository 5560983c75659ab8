// Tensor parallelism: o_residual and down_residual of one rank of several. Each rank has some of
// the heads and of the intermediate columns, so its GEMM gives a share of the sum; the residual
// stream is whole on every rank. The shares are added up by the host (sl_reduce of abi.h): worker 0
// calls it while the others wait at a barrier.
#pragma once
#include "abi.h"
#include "sinterlm/matmul.h"

namespace sl {

// This rank's place among the others, and its way to them.
struct Ranks {
  int rank = 0;
  sl_reduce reduce = nullptr;
  void* context = nullptr;
  int32_t status = 0;  // of this step's reduces; the first that fails is the last that is called

  void sum(float* data, int64_t count) {
    if (status == 0) status = reduce(context, data, count);
  }
};

// x' = x + (sum over ranks of a W^T) + bias, and the by-products the next norm needs. Rank 0 brings
// x and the bias, so that what is reduced is x' itself, in place: no buffer beside it, and an fp32
// sum of as many terms as there are ranks.
template <class F, class Next>
void reduced_residual(Worker& w, const ResidualArgs<F, Next>& p, Ranks* ranks) {
  const int rows = p.batch->num_tokens;
  const bool leads = ranks->rank == 0;
  const auto share = [&](int t, int c0, int c1, const float* c) {
    const int64_t row = int64_t(t) * p.Hp;
    for (int n = c0; n < c1; n += kLanes) {
      Vec v = load(c + n - c0);
      if (leads) {
        if (p.bias) v = add(v, load(p.bias + n));
        v = add(v, load(p.x + row + n));
      }
      store(p.out.x + row + n, v);
    }
  };
  matmul<F>(w, p.a, rows, p.weight, p.K, p.Hp, kLanes, share);
  w.barrier();
  if (w.id == 0) ranks->sum(p.out.x, int64_t(rows) * p.Hp);
  w.barrier();
  const int units = p.Hp / Next::kUnit;
  w.for_each_static(rows * units, [&](int i) {
    const int t = i / units, first = i % units * Next::kUnit;
    const float* x = p.out.x + int64_t(t) * p.Hp;
    store_stream(p.out, p.norm_weight, p.Hp, t, first, [&](int n) { return load(x + n); });
  });
}

}  // namespace sl
