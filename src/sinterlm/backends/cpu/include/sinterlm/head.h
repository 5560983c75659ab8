// The head: logits of the rows that are sampled, handed to the sampler while they are in cache.
#pragma once
#include "sinterlm/matmul.h"
#include "sinterlm/sample.h"

namespace sl {

static_assert(kPanelCols == kSpan, "the sampler sees a panel at a time");

// The operands of the rows to be sampled, side by side (a phase of its own).
template <class F>
void gather_rows(Worker& w, const LmHeadArgs<F>& p) {
  w.for_each_static(p.num_rows, [&](int r) {
    std::memcpy(p.gathered.row(r), p.xw.row(p.rows[r]), F::row_bytes(p.Hp));
  });
}

// logits = (gathered W^T) * rstd, kept unless the row is drawn from them here; columns of padding
// are written too and never read.
template <class F>
void lm_head(Worker& w, const LmHeadArgs<F>& p) {
  float* rstd = row_floats(w);
  for (int r = 0; r < p.num_rows; ++r) rstd[r] = row_rstd(p.ssq, p.rows[r], p.Hp, p.H, p.eps);
  const auto finish = [&](int r, int c0, int, float* c) {
    const bool early = p.sampler && p.sampler->is_early(r);
    float* out = early ? c : p.logits + int64_t(r) * p.Vp + c0;
    const Vec scale = set1(rstd[r]);
    for (int i = 0; i < kPanelCols; i += kLanes) store(out + i, mul(load(c + i), scale));
    if (early) p.sampler->see(w.id, r, c0, out);
  };
  matmul<F>(w, p.gathered, p.num_rows, p.weight, p.Hp, p.Vp, kPanelCols, finish);
}

}  // namespace sl
