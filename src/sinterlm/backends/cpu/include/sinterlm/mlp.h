// h = silu(gate) * up, both halves of the same columns from one pass over interleaved panels.
#pragma once
#include "sinterlm/matmul.h"

namespace sl {

// Columns [c0, c1) of F: gate is panel 2 * (c / 64), up the panel after it.
template <class F, class Next>
void norm_gate_up_act(Worker& w, const GateUpArgs<F, Next>& p) {
  const int rows = p.batch->num_tokens;
  const Cut cut(p.Fp, rows, kPanelCols, Next::kUnit, w.count);
  float* gate = static_cast<float*>(w.scratch);
  float* up = gate + kRowBlock * kPanelCols;
  float* rstd = up + kRowBlock * kPanelCols;
  w.for_each(cut.items(), [&](int item) {
    const auto [c0, c1, r0, r1] = cut[item];
    const int g0 = c0 / kPanelCols * 2 * kPanelCols + c0 % kPanelCols;  // packed gate column
    const int u0 = g0 + kPanelCols;
    for (int r = r0; r < r1; r += kRowBlock) {
      const int n = std::min(kRowBlock, r1 - r);
      const auto half = [&](int first, float* out) {
        columns<F>(n, p.xw.row(r), p.xw.pitch, p.weight, p.Hp, first, first + c1 - c0, out,
                   kPanelCols, panel_scratch(w));
      };
      half(g0, gate);
      half(u0, up);
      for (int i = 0; i < n; ++i) rstd[i] = row_rstd(p.ssq, r + i, p.Hp, p.H, p.eps);
      for (int i = 0; i < n; ++i) {
        const Vec scale = set1(rstd[i]);
        for (int j = 0; j < c1 - c0; j += kLanes) {
          Vec g = mul(load(gate + i * kPanelCols + j), scale);
          Vec u = mul(load(up + i * kPanelCols + j), scale);
          if (p.bias) {
            g = add(g, load(p.bias + g0 + j));
            u = add(u, load(p.bias + u0 + j));
          }
          store(gate + i * kPanelCols + j, mul(silu(g), u));
        }
        for (int j = 0; j < c1 - c0; j += Next::kUnit)
          Next::store(p.h.row(r + i), p.Fp, c0 + j, gate + i * kPanelCols + j);
      }
    }
  });
}

}  // namespace sl
