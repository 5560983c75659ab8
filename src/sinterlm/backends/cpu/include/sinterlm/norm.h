// Embedding lookup and the by-products of the residual stream that the first norm needs.
#pragma once
#include "sinterlm/matmul.h"

namespace sl {

// 16 columns [n, n + 16) of embedding row `id` from lm_head panels (tied weights), as fp32.
template <class E>
SL_INLINE Vec panel_row(const E* panels, int id, int n, int Hp) {
  constexpr int P = kPair<E>;
  const E* lane = panels + int64_t(id / kPanelCols) * kPanelCols * Hp + id % kPanelCols * P;
  float v[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const int k = n + i;
    v[i] = to_float(lane[int64_t(k / P) * kPanelCols * P + k % P]);
  }
  return load(v);
}

template <class E>
void embed_norm(Worker& w, const EmbedArgs<E>& p) {
  w.for_each_static(p.batch->num_tokens, [&](int t) {
    const int id = p.batch->token_ids[t];
    const int64_t row = int64_t(t) * p.Hp;
    for (int n = 0; n < p.Hp; n += kLanes) {
      const Vec v = p.table_is_panels ? panel_row(p.table, id, n, p.Hp)
                                      : load_elems(p.table + int64_t(id) * p.Hp + n);
      store(p.out.x + row + n, v);
      store_elems(p.out.xw + row + n, mul(v, load(p.norm_weight + n)));
      p.out.ssq[(row + n) / kLanes] = reduce_add(mul(v, v));
    }
  });
}

}  // namespace sl
