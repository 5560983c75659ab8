// Everything that can be wrong with the arguments of a step, found before anything runs. Messages
// name the argument, its index and its value. M is the model of any target: its `spec` has V,
// num_layers and kv_width, and it keeps `args`, `slots` and `sampling`.
#pragma once
#include <cmath>
#include <cstring>

#include "sinterlm/error.h"
#include "sinterlm/sample_filter.h"

namespace sl {

// Temperatures below this are greedy: dividing by them would overflow fp32.
constexpr float kGreedyBelow = 1e-5f;

inline sl_status check_not_null(const void* p, const char* name) {
  return p ? SL_OK : fail(SL_INVALID, "%s is null", name);
}

inline sl_status check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return SL_OK;
  return fail(SL_INVALID, "%s is %lld and must be in [%lld, %lld]", name, (long long)value,
              (long long)low, (long long)high);
}

inline sl_status check_at(const char* name, int index, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return SL_OK;
  return fail(SL_INVALID, "%s[%d] is %lld and must be in [%lld, %lld]", name, index,
              (long long)value, (long long)low, (long long)high);
}

template <class M>
sl_status check_kv(const M& m, const sl_kv* kv) {
  SL_TRY(check_not_null(kv, "kv"));
  if (kv->size < sizeof(sl_kv)) return fail(SL_MISMATCH, "kv.size is %u", kv->size);
  SL_TRY(check_range("kv.num_pages", kv->num_pages, 1, INT32_MAX));
  SL_TRY(check_range("kv.num_layers", kv->num_layers, m.spec->num_layers, m.spec->num_layers));
  if (kv->page_tokens < 16 || kv->page_tokens % 16 != 0)
    return fail(SL_INVALID, "kv.page_tokens is %d and must be a multiple of 16", kv->page_tokens);
  const int64_t content = int64_t{2} * kv->page_tokens * m.spec->kv_width;
  SL_TRY(check_range("kv.head_stride", kv->head_stride, content, INT64_MAX));
  SL_TRY(check_range("kv.page_stride", kv->page_stride, content, INT64_MAX));
  SL_TRY(check_not_null(kv->kv_base, "kv.kv_base"));
  for (int i = 0; i < kv->num_layers; ++i)
    if (!kv->kv_base[i]) return fail(SL_INVALID, "kv.kv_base[%d] is null", i);
  return SL_OK;
}

// Several steps in one call need rows that nobody looks at in between.
template <class M>
sl_status check_repeat(const M& m, const sl_step_args& a) {
  SL_TRY(check_range("num_steps", a.num_steps, 1, m.args.max_model_len));
  if (a.num_steps == 1) return SL_OK;
  SL_TRY(check_not_null(a.out_num_steps, "out_num_steps"));
  if (a.flags != SL_STEP_SAMPLE)
    return fail(SL_INVALID, "num_steps is %d and flags %u: only SL_STEP_SAMPLE can be repeated",
                a.num_steps, a.flags);
  if (a.num_tokens != a.num_seqs || a.num_sample_rows != a.num_seqs)
    return fail(SL_INVALID,
                "num_steps is %d with %d tokens and %d sample rows of %d sequences: each must "
                "have one token, sampled",
                a.num_steps, a.num_tokens, a.num_sample_rows, a.num_seqs);
  return SL_OK;
}

// One sequence: its place in the batch, positions, pages, and the tokens themselves.
template <class M>
sl_status check_sequence(const M& m, const sl_step_args& a, int s) {
  const int first = a.query_start[s], last = a.query_start[s + 1];
  if (last <= first || last > a.num_tokens)
    return fail(SL_INVALID, "query_start[%d] is %d and must be in (%d, %d]", s + 1, last, first,
                a.num_tokens);
  const int context = a.context_lens[s];
  SL_TRY(check_at("context_lens", s, context, last - first, m.args.max_model_len));
  const int slot = a.slots ? a.slots[s] : -1;
  SL_TRY(check_at("slots", s, slot, -1, m.args.num_slots - 1));
  for (int t = first; t < last; ++t) {
    const int expected = context - (last - t);
    if (a.positions[t] != expected)
      return fail(SL_INVALID, "positions[%d] is %d and must be %d (context_lens[%d] is %d)", t,
                  a.positions[t], expected, s, context);
    if (a.token_ids[t] == -1 && t == first && slot >= 0) {
      if (m.slots[slot] < 0)
        return fail(SL_INVALID, "token_ids[%d] is -1 and slot %d holds no token yet", t, slot);
      continue;
    }
    SL_TRY(check_at("token_ids", t, a.token_ids[t], 0, m.spec->V - 1));
  }
  const int end = context + a.num_steps - 1;
  if (end > m.args.max_model_len)
    return fail(SL_INVALID, "context_lens[%d] is %d and num_steps %d: beyond max_model_len %d", s,
                context, a.num_steps, m.args.max_model_len);
  const int pages = (end + a.kv->page_tokens - 1) / a.kv->page_tokens;
  if (pages > a.page_table_stride)
    return fail(SL_INVALID, "context_lens[%d] is %d: %d pages, and page_table_stride is %d", s,
                context, pages, a.page_table_stride);
  const int32_t* table = a.page_table + int64_t(s) * a.page_table_stride;
  for (int p = 0; p < pages; ++p)
    if (table[p] < 0 || table[p] >= a.kv->num_pages)
      return fail(SL_INVALID, "page_table[%d][%d] is %d and must be in [0, %d]", s, p, table[p],
                  a.kv->num_pages - 1);
  return SL_OK;
}

inline sl_status check_ids(const char* name, int row, const int32_t* ids, int n, int V) {
  if (n < 0) return fail(SL_INVALID, "sampling[%d].num_%s is %d", row, name, n);
  if (n > 0 && !ids) return fail(SL_INVALID, "sampling[%d].%s is null", row, name);
  for (int i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= V)
      return fail(SL_INVALID, "sampling[%d].%s[%d] is %d and must be in [0, %d]", row, name, i,
                  ids[i], V - 1);
  return SL_OK;
}

inline sl_status check_sampling(const sl_sampling& s, int row, int V, int max_logprobs) {
  const struct {
    const char* name;
    float value;
    bool ok;
  } numbers[] = {
      {"temperature", s.temperature, s.temperature >= 0},
      {"top_p", s.top_p, s.top_p > 0 && s.top_p <= 1},
      {"min_p", s.min_p, s.min_p >= 0 && s.min_p <= 1},
      {"repetition_penalty", s.repetition_penalty, s.repetition_penalty > 0},
      {"presence_penalty", s.presence_penalty, true},
      {"frequency_penalty", s.frequency_penalty, true},
  };
  for (const auto& n : numbers)
    if (!n.ok || !std::isfinite(n.value))
      return fail(SL_INVALID, "sampling[%d].%s is %g", row, n.name, double{n.value});
  if (s.top_k < 0) return fail(SL_INVALID, "sampling[%d].top_k is %d", row, s.top_k);
  if (s.num_logprobs < -1 || s.num_logprobs > max_logprobs)
    return fail(SL_INVALID, "sampling[%d].num_logprobs is %d and max_logprobs %d", row,
                s.num_logprobs, max_logprobs);
  if (has_penalty(s)) {
    SL_TRY(check_ids("prompt_tokens", row, s.prompt_tokens, s.num_prompt_tokens, V));
    SL_TRY(check_ids("output_tokens", row, s.output_tokens, s.num_output_tokens, V));
  }
  SL_TRY(check_ids("bias_ids", row, s.bias_ids, s.num_bias, V));
  SL_TRY(check_ids("stop_tokens", row, s.stop_tokens, s.num_stop_tokens, V));
  if (s.num_bias > 0 && !s.bias) return fail(SL_INVALID, "sampling[%d].bias is null", row);
  for (int i = 0; i < s.num_bias; ++i)
    if (!(s.bias[i] < INFINITY))
      return fail(SL_INVALID, "sampling[%d].bias[%d] is %g", row, i, double{s.bias[i]});
  return SL_OK;
}

// Copies the rows' parameters into m.sampling: structs of a newer caller may be longer.
template <class M>
sl_status take_sampling(M& m, const sl_step_args& a) {
  const char* from = reinterpret_cast<const char*>(a.sampling);
  SL_TRY(check_range("max_logprobs", a.max_logprobs, 0, m.spec->V));
  bool logprobs = false;
  for (int r = 0; r < a.num_sample_rows; ++r) {
    uint32_t size;
    std::memcpy(&size, from, sizeof size);
    if (size < sizeof(sl_sampling))
      return fail(SL_MISMATCH, "sampling[%d].size is %u and this library needs %zu", r, size,
                  sizeof(sl_sampling));
    std::memcpy(&m.sampling[r], from, sizeof(sl_sampling));
    from += size;
    sl_sampling& s = m.sampling[r];
    SL_TRY(check_sampling(s, r, m.spec->V, a.max_logprobs));
    if (a.num_steps > 1 && has_penalty(s))
      return fail(SL_INVALID, "sampling[%d] has penalties, whose history %d steps would outrun", r,
                  a.num_steps);
    if (s.temperature < kGreedyBelow) s.temperature = 0;
    logprobs |= s.num_logprobs >= 0;
  }
  SL_TRY(check_not_null(a.out_tokens, "out_tokens"));
  if (logprobs) {
    SL_TRY(check_not_null(a.out_logprobs, "out_logprobs"));
    SL_TRY(check_not_null(a.out_ranks, "out_ranks"));
  }
  if (a.max_logprobs > 0) {
    SL_TRY(check_not_null(a.out_top_ids, "out_top_ids"));
    SL_TRY(check_not_null(a.out_top_logprobs, "out_top_logprobs"));
  }
  return SL_OK;
}

template <class M>
sl_status check_step(M& m, const sl_step_args& a) {
  constexpr uint32_t kKnown = SL_STEP_SAMPLE | SL_STEP_LOGITS | SL_STEP_HIDDEN;
  if (a.flags == 0 || a.flags & ~kKnown) return fail(SL_INVALID, "flags is %u", a.flags);
  SL_TRY(check_range("num_tokens", a.num_tokens, 1, m.args.max_tokens));
  SL_TRY(check_range("num_seqs", a.num_seqs, 1, m.args.max_seqs));
  SL_TRY(check_range("num_sample_rows", a.num_sample_rows, 0, m.args.max_sample_rows));
  SL_TRY(check_range("page_table_stride", a.page_table_stride, 1, INT32_MAX));
  SL_TRY(check_not_null(a.token_ids, "token_ids"));
  SL_TRY(check_not_null(a.positions, "positions"));
  SL_TRY(check_not_null(a.query_start, "query_start"));
  SL_TRY(check_not_null(a.context_lens, "context_lens"));
  SL_TRY(check_not_null(a.page_table, "page_table"));
  SL_TRY(check_kv(m, a.kv));
  SL_TRY(check_at("query_start", 0, a.query_start[0], 0, 0));
  SL_TRY(check_repeat(m, a));
  for (int s = 0; s < a.num_seqs; ++s) SL_TRY(check_sequence(m, a, s));
  SL_TRY(
      check_at("query_start", a.num_seqs, a.query_start[a.num_seqs], a.num_tokens, a.num_tokens));
  if (a.num_sample_rows > 0) {
    SL_TRY(check_not_null(a.sample_rows, "sample_rows"));
    for (int r = 0, low = 0; r < a.num_sample_rows; low = a.sample_rows[r++] + 1)
      SL_TRY(check_at("sample_rows", r, a.sample_rows[r], low, a.num_tokens - 1));
    if (a.flags & SL_STEP_SAMPLE) {
      SL_TRY(check_not_null(a.sampling, "sampling"));
      SL_TRY(take_sampling(m, a));
    }
    if (a.flags & SL_STEP_LOGITS) SL_TRY(check_not_null(a.out_logits, "out_logits"));
  }
  if (a.flags & SL_STEP_HIDDEN) SL_TRY(check_not_null(a.out_hidden, "out_hidden"));
  return SL_OK;
}

}  // namespace sl
