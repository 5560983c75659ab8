// h = silu(gate) * up, both halves of the same columns from one pass over interleaved panels.
#pragma once
#include "sinterlm/matmul.h"

namespace sl {

// Columns [c0, c1) of F: gate is panel 2 * (c / 64), up the panel after it.
template <class F, class Next>
void norm_gate_up_act(Worker& w, const GateUpArgs<F, Next>& p) {
  const Cut cut(p.Fp, p.batch->num_tokens, kPanelCols, Next::kUnit, *w.team);
  float* gate = static_cast<float*>(w.scratch);
  float* up = gate + kRowBlock * kPanelCols;
  const float* rstd = rstd_of_rows(w, p.ssq, p.batch->num_tokens, p.Hp, p.H, p.eps);
  const auto compute = [&](int r, int n, int c0, int c1, float* c, int ld) {
    const int g0 = c0 / kPanelCols * 2 * kPanelCols + c0 % kPanelCols;  // packed gate column
    const int u0 = g0 + kPanelCols;
    const auto half = [&](int first, float* out) {
      columns<F>(n, p.xw.row(r), p.xw.pitch, p.weight, p.Hp, first, first + c1 - c0, out,
                 kPanelCols, panel_scratch(w));
    };
    half(g0, gate);
    half(u0, up);
    for (int i = 0; i < n; ++i) {
      const Vec scale = set1(rstd[r + i]);
      for (int j = 0; j < c1 - c0; j += kLanes) {
        Vec g = mul(load(gate + i * kPanelCols + j), scale);
        Vec u = mul(load(up + i * kPanelCols + j), scale);
        if (p.bias) {
          g = add(g, load(p.bias + g0 + j));
          u = add(u, load(p.bias + u0 + j));
        }
        store(c + int64_t(i) * ld + j, mul(silu(g), u));
      }
    }
  };
  in_blocks(w, cut, kPanelCols, compute, [&](int t, int c0, int c1, const float* c) {
    for (int n = c0; n < c1; n += Next::kUnit) Next::store(p.h.row(t), p.Fp, n, c + n - c0);
  });
}

}  // namespace sl
