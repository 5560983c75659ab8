// Embedding lookup and the by-products of the residual stream that the first norm needs.
#pragma once
#include "sinterlm/matmul.h"

namespace sl {

template <class F, class Next>
void embed_norm(Worker& w, const EmbedArgs<F, Next>& p) {
  w.for_each_static(p.batch->num_tokens, [&](int t) {
    const int id = p.batch->token_ids[t];
    for (int n = 0; n < p.Hp; n += Next::kUnit)
      store_stream(p.out, p.norm_weight, p.Hp, t, n, [&](int i) {
        return Table<F>::load(p.table, p.table_is_panels, id, i, p.H, p.Hp);
      });
  });
}

}  // namespace sl
