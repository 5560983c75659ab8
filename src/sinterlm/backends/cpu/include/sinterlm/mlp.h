// h = silu(gate) * up, both halves of the same columns from one pass over interleaved panels.
#pragma once
#include "sinterlm/matmul.h"

namespace sl {

// Columns [c0, c1) of F: gate is panel 2 * (c / 64), up the panel after it.
template <class E>
void norm_gate_up_act(Worker& w, const GateUpArgs<E>& p) {
  const int rows = p.batch->num_tokens;
  const Cut cut(p.Fp, rows, kPanelCols, kLanes, w.count);
  float* gate = static_cast<float*>(w.scratch);
  float* up = gate + kRowBlock * kPanelCols;
  float* rstd = up + kRowBlock * kPanelCols;
  w.for_each(cut.items(), [&](int item) {
    const auto [c0, c1, r0, r1] = cut[item];
    const int g0 = c0 / kPanelCols * 2 * kPanelCols + c0 % kPanelCols;  // packed gate column
    const int u0 = g0 + kPanelCols;
    for (int r = r0; r < r1; r += kRowBlock) {
      const int n = std::min(kRowBlock, r1 - r);
      const E* a = p.xw + int64_t(r) * p.Hp;
      columns<E>(n, a, p.Hp, p.weight, p.Hp, g0, g0 + c1 - c0, gate, kPanelCols);
      columns<E>(n, a, p.Hp, p.weight, p.Hp, u0, u0 + c1 - c0, up, kPanelCols);
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
          store_elems(p.h + int64_t(r + i) * p.Fp + c0 + j, mul(silu(g), u));
        }
      }
    }
  });
}

}  // namespace sl
