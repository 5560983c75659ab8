// q, k, v from one GEMM, finished head by head while the sums are still in cache: scale by the
// folded norm, bias, per-head norm, rope, then q to its buffer and k, v into the pages.
#pragma once
#include "sinterlm/matmul.h"

namespace sl {

// RMSNorm of one head in place: v[D] * rsqrt(mean(v^2) + eps) * weight[D].
template <int D>
inline void head_norm(float* v, const float* weight, float eps) {
  Vec acc = zero();
  for (int i = 0; i < D; i += kLanes) acc = fma(load(v + i), load(v + i), acc);
  const Vec scale = set1(1.0f / __builtin_sqrtf(reduce_add(acc) / static_cast<float>(D) + eps));
  for (int i = 0; i < D; i += kLanes) store(v + i, mul(mul(load(v + i), scale), load(weight + i)));
}

// Rotates pairs (i, i + D/2) of one head in place; cos and sin are [D/2] for this position.
template <int D>
inline void rope(float* v, const float* cos, const float* sin) {
  constexpr int half = D / 2;
  float out[D];
  for (int i = 0; i < half; ++i) {
    out[i] = v[i] * cos[i] - v[i + half] * sin[i];
    out[i + half] = v[i + half] * cos[i] + v[i] * sin[i];
  }
  std::memcpy(v, out, sizeof out);
}

// Where position `pos` of sequence `seq` lies: its page of this head, and the slot inside.
template <class C>
struct Slot {
  C* page;
  int index;
};

template <class C>
inline Slot<C> find_slot(const Batch& b, const Pages<C>& p, int seq, int pos, int head) {
  const int id = b.page_table[int64_t(seq) * b.page_table_stride + pos / p.page_tokens];
  return {p.base + id * p.page_stride + head * p.head_stride, pos % p.page_tokens};
}

// Where a page's V begins.
template <class C, int D>
inline C* v_half(C* page, int page_tokens) {
  return page + int64_t(page_tokens) * kv_width<C>(D);
}
// The scales of one half in codes.
template <int D>
inline float* scales_of(code8* half, int page_tokens) {
  return reinterpret_cast<float*>(half + int64_t(page_tokens) * D);
}

// One head of a token as its half of a page stores it; its scale, where that is codes, goes there.
template <class C, int D>
inline void narrow_head(C* to, const float* v, C* half, int index, int page_tokens) {
  if constexpr (kInCodes<C>) {
    const GroupScale group = GroupScale::of<D>(v);
    for (int i = 0; i < D; i += kLanes)
      store_codes(reinterpret_cast<int8_t*>(to + i), group.codes(v + i));
    scales_of<D>(half, page_tokens)[index] = group.scale;
  } else {
    for (int i = 0; i < D; i += kLanes) store_elems(to + i, load(v + i));
  }
}

// K [page_tokens/16][D/P][16][P]
template <class C, int D>
inline void store_k(const Slot<C>& s, const float* k, int page_tokens) {
  constexpr int P = kPair<C>;
  C* out = s.page + int64_t(s.index / kLanes) * D * kLanes + s.index % kLanes * P;
  C narrow[D];
  narrow_head<C, D>(narrow, k, s.page, s.index, page_tokens);
  for (int i = 0; i < D; i += P) std::memcpy(out + i * kLanes, narrow + i, P * sizeof(C));
}

// V [page_tokens/P][D][P]. Writing the even token of a pair clears the odd one, so that a masked
// product is an exact zero, unless `next_too`: then another row of this step owns it.
template <class C, int D>
inline void store_v(const Slot<C>& s, const float* v, int page_tokens, bool next_too) {
  constexpr int P = kPair<C>;
  C* half = v_half<C, D>(s.page, page_tokens);
  C* out = half + int64_t(s.index / P) * D * P + s.index % P;
  C narrow[D];
  narrow_head<C, D>(narrow, v, half, s.index, page_tokens);
  const bool clear = P == 2 && s.index % 2 == 0 && !next_too;
  for (int i = 0; i < D; ++i) {
    out[i * P] = narrow[i];
    if (clear) out[i * P + P - 1] = C{};
  }
}

// Asks for part `i` of `n` of the lines that store_k and store_v will write a token to. A token
// alone in its page finds none of them in cache, and one pair of K lies in each. (Inlined by force:
// see Ahead::ask.)
template <class C, int D>
SL_INLINE void ask_slot(const Slot<C>& s, int page_tokens, int i, int n) {
  constexpr int kLine = 64, P = kPair<C>;
  const char* k = reinterpret_cast<const char*>(s.page + int64_t(s.index / kLanes) * D * kLanes);
  const char* v = reinterpret_cast<const char*>(v_half<C, D>(s.page, page_tokens) +
                                                int64_t(s.index / P) * D * P);
  constexpr int kOfK = D * kLanes * int{sizeof(C)} / kLine, kOfV = D * P * int{sizeof(C)} / kLine;
  for (int l = kOfK * i / n; l < kOfK * (i + 1) / n; ++l) __builtin_prefetch(k + l * kLine, 1, 2);
  for (int l = kOfV * i / n; l < kOfV * (i + 1) / n; ++l) __builtin_prefetch(v + l * kLine, 1, 2);
}

// Packed head `index` is, for each kv head, its G query heads, then k, then v.
template <class E, int D, class C, class F>
void finish_head(const QkvArgs<E, C, F>& p, int index, int t, float* v, float rstd) {
  const int G = p.Hq / p.Hkv, kv_head = index / (G + 2), part = index % (G + 2);
  const Batch& b = *p.batch;
  const float* bias = p.bias ? p.bias + index * D : nullptr;
  for (int i = 0; i < D; i += kLanes) {
    const Vec x = mul(load(v + i), set1(rstd));
    store(v + i, bias ? add(x, load(bias + i)) : x);
  }
  const int pos = b.positions[t], seq = b.token_seq[t];
  const bool is_v = part == G + 1, is_k = part == G;
  if (!is_v) {
    const float* norm = is_k ? p.k_norm : p.q_norm;
    if (norm) head_norm<D>(v, norm, p.qk_eps);
    rope<D>(v, p.cos + int64_t(pos) * (D / 2), p.sin + int64_t(pos) * (D / 2));
  }
  const Slot<C> slot = find_slot(b, p.pages, seq, pos, kv_head);
  if (part < G) {
    if (b.query_start[seq + 1] - b.query_start[seq] == 1)
      ask_slot<C, D>(slot, p.pages.page_tokens, part, G);
    E* q = p.q + int64_t(t) * p.Qp + (kv_head * G + part) * D;
    for (int i = 0; i < D; i += kLanes) store_elems(q + i, load(v + i));
    return;
  }
  if (is_k) {
    store_k<C, D>(slot, v, p.pages.page_tokens);
  } else {
    store_v<C, D>(slot, v, p.pages.page_tokens, t + 1 < b.query_start[seq + 1]);
  }
}

template <class E, int D, class C, class F>
void norm_qkv_rope_kv(Worker& w, const QkvArgs<E, C, F>& p) {
  static_assert(D % kLanes == 0, "head size must be a multiple of 16");
  static_assert(size_t{kRowBlock} * D * sizeof(float) <= kSumsBytes, "sums reach into row_floats");
  const int heads = p.Hq + 2 * p.Hkv, rows = p.batch->num_tokens;
  const Cut cut(heads * D, rows, D, D, *w.team);
  const float* rstd = rstd_of_rows(w, p.ssq, rows, p.Hp, p.H, p.eps);
  const auto compute = [&](int r, int n, int c0, int c1, float* c, int ld) {
    columns<F>(n, p.xw.row(r), p.xw.pitch, p.weight, p.Hp, c0, c1, c, ld, panel_scratch(w));
  };
  in_blocks(w, cut, D, compute,
            [&](int t, int c0, int, float* c) { finish_head<E, D>(p, c0 / D, t, c, rstd[t]); });
}

}  // namespace sl
