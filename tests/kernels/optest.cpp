// One run-time-shape library per ISA level: every kernel behind a C function, for the op tests.
// KV_CODES: with KV pages in codes.
#include <vector>

#include "sinterlm/attention.h"
#include "sinterlm/head.h"
#include "sinterlm/mlp.h"
#include "sinterlm/norm.h"

using namespace sl;

namespace {

// Everything a test says about the step and its pages.
struct Step {
  int32_t num_tokens, num_seqs;
  const int32_t *token_ids, *positions, *query_start, *context_lens, *token_seq, *page_table;
  int32_t page_table_stride, page_tokens;
  void* pages;
  int64_t page_stride, head_stride;
};

Batch batch_of(const Step& s) {
  return {s.num_tokens,   s.num_seqs,  s.token_ids,  s.positions,        s.query_start,
          s.context_lens, s.token_seq, s.page_table, s.page_table_stride};
}

#ifdef KV_CODES
template <class E>
using Cache = code8;
#else
template <class E>
using Cache = E;
#endif

template <class E>
Pages<Cache<E>> pages_of(const Step& s) {
  return {static_cast<Cache<E>*>(s.pages), s.page_stride, s.head_stride, s.page_tokens};
}

template <class Fn>
void on_workers(int threads, Fn fn) {
  Pool pool(threads, nullptr);
  pool.run(fn);
}

// fn.template operator()<D>() for the head sizes under test.
template <class Fn>
int with_head_size(int D, Fn fn) {
  switch (D) {
    case 16:
      fn(std::integral_constant<int, 16>());
      return 0;
    case 48:
      fn(std::integral_constant<int, 48>());
      return 0;
    case 64:
      fn(std::integral_constant<int, 64>());
      return 0;
    case 80:
      fn(std::integral_constant<int, 80>());
      return 0;
    case 128:
      fn(std::integral_constant<int, 128>());
      return 0;
    default:
      return 1;
  }
}

template <class Fn>
int with_dtype(int is_bf16, Fn fn) {
  return is_bf16 ? fn(bf16{}) : fn(float{});
}

// Rows of K elements of E, side by side.
template <class E>
Rows<Wide<E>> wide_rows(const void* data, int K) {
  return {static_cast<char*>(const_cast<void*>(data)), int64_t(K) * int64_t{sizeof(E)}};
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// The items of a GEMM as (c0, c1, r0, r1) in the order they are claimed; returns how many.
API int ot_cut(int cols, int rows, int unit, int granule, int workers, int32_t* blocks, int room) {
  const Team team(workers);
  const Cut cut(cols, rows, unit, granule, team);
  for (int i = 0; i < std::min(room, cut.items()); ++i) {
    const Block b = cut[i];
    const int32_t from[] = {b.c0, b.c1, b.r0, b.r1};
    std::copy_n(from, 4, blocks + 4 * i);
  }
  return cut.items();
}

API int ot_residual(int is_bf16, int threads, int T, int K, int Hp, const void* a, const void* w,
                    const float* bias, const float* norm, const float* x, float* out_x, void* xw,
                    float* ssq) {
  return with_dtype(is_bf16, [&](auto e) {
    using E = decltype(e);
    Batch b{};
    b.num_tokens = T;
    const ResidualArgs<Wide<E>, Wide<E>> p{&b,
                                           wide_rows<E>(a, K),
                                           static_cast<const E*>(w),
                                           bias,
                                           norm,
                                           x,
                                           {out_x, wide_rows<E>(xw, Hp), ssq},
                                           K,
                                           Hp};
    on_workers(threads, [&](Worker& wk) { residual_matmul(wk, p); });
    return 0;
  });
}

API int ot_gate_up(int is_bf16, int threads, int T, int H, int Hp, int Fp, const void* xw,
                   const float* ssq, const void* w, const float* bias, float eps, void* h) {
  return with_dtype(is_bf16, [&](auto e) {
    using E = decltype(e);
    Batch b{};
    b.num_tokens = T;
    const GateUpArgs<Wide<E>, Wide<E>> p{&b,   wide_rows<E>(xw, Hp),
                                         ssq,  static_cast<const E*>(w),
                                         bias, wide_rows<E>(h, Fp),
                                         eps,  H,
                                         Hp,   Fp};
    on_workers(threads, [&](Worker& wk) { norm_gate_up_act(wk, p); });
    return 0;
  });
}

API int ot_lm_head(int is_bf16, int threads, int R, int H, int Hp, int V, int Vp, const void* xw,
                   const float* ssq, const int32_t* rows, const void* w, float eps, float* logits,
                   void* gathered) {
  return with_dtype(is_bf16, [&](auto e) {
    using E = decltype(e);
    const LmHeadArgs<Wide<E>> p{wide_rows<E>(xw, Hp),
                                ssq,
                                rows,
                                R,
                                static_cast<const E*>(w),
                                logits,
                                wide_rows<E>(gathered, Hp),
                                eps,
                                H,
                                Hp,
                                V,
                                Vp,
                                nullptr};
    on_workers(threads, [&](Worker& wk) {
      gather_rows(wk, p);
      wk.barrier();
      lm_head(wk, p);
    });
    return 0;
  });
}

API int ot_embed(int is_bf16, int threads, const Step* s, int H, int Hp, const void* table,
                 int is_panels, const float* norm, float* x, void* xw, float* ssq) {
  return with_dtype(is_bf16, [&](auto e) {
    using E = decltype(e);
    const Batch b = batch_of(*s);
    const EmbedArgs<Wide<E>, Wide<E>> p{&b,   static_cast<const E*>(table),   is_panels != 0,
                                        norm, {x, wide_rows<E>(xw, Hp), ssq}, H,
                                        Hp};
    on_workers(threads, [&](Worker& wk) { embed_norm(wk, p); });
    return 0;
  });
}

API int ot_qkv(int is_bf16, int threads, const Step* s, int H, int Hp, int Hq, int Hkv, int D,
               const void* xw, const float* ssq, const void* w, const float* bias,
               const float* q_norm, const float* k_norm, const float* cos, const float* sin,
               float eps, float qk_eps, void* q) {
  return with_dtype(is_bf16, [&](auto e) {
    using E = decltype(e);
    const Batch b = batch_of(*s);
    const QkvArgs<E, Cache<E>, Wide<E>> p{&b,
                                          wide_rows<E>(xw, Hp),
                                          ssq,
                                          static_cast<const E*>(w),
                                          bias,
                                          q_norm,
                                          k_norm,
                                          cos,
                                          sin,
                                          static_cast<E*>(q),
                                          pages_of<E>(*s),
                                          eps,
                                          qk_eps,
                                          H,
                                          Hp,
                                          Hq,
                                          Hkv,
                                          Hq * D};
    return with_head_size(D, [&](auto d) {
      on_workers(threads, [&](Worker& wk) { norm_qkv_rope_kv<E, decltype(d)::value>(wk, p); });
    });
  });
}

API int ot_attention(int is_bf16, int threads, const Step* s, int Hq, int Hkv, int D, float scale,
                     int window, const void* q, void* y, int parts_floats) {
  std::vector<float> parts(parts_floats, NAN);
  return with_dtype(is_bf16, [&](auto e) {
    using E = decltype(e);
    const Batch b = batch_of(*s);
    const AttentionArgs<E, Cache<E>, Wide<E>> p{&b,
                                                static_cast<const E*>(q),
                                                wide_rows<E>(y, Hq * D),
                                                pages_of<E>(*s),
                                                scale,
                                                window,
                                                Hq,
                                                Hkv,
                                                Hq * D,
                                                parts.data(),
                                                parts_floats};
    return with_head_size(D, [&](auto d) {
      on_workers(threads, [&](Worker& wk) { attention<E, decltype(d)::value>(wk, p); });
    });
  });
}

// n is a multiple of 16. what: 0 = exp, 1 = silu
API void ot_map(int what, const float* x, float* y, int n) {
  for (int i = 0; i < n; i += kLanes)
    store(y + i, what == 0 ? sl::exp(load(x + i)) : silu(load(x + i)));
}

API void ot_narrow(const float* x, bf16* vector, bf16* scalar, int n) {
  for (int i = 0; i < n; i += kLanes) store_elems(vector + i, load(x + i));
  for (int i = 0; i < n; ++i) scalar[i] = from_float<bf16>(x[i]);
}

API const char* ot_isa() { return SL_ISA_NAME; }
