// sl_step and sl_head: one parallel region from token ids to tokens, or to those of several steps.
#pragma once
#include "sinterlm/calls.h"
#include "sinterlm/head.h"
#include "sinterlm/open.h"
#include "sinterlm/step_check.h"

namespace sl {

// The last tokens that slots stand for, the sequence of each token, and copies of what moves from
// one step to the next.
inline void take_tokens(Model& m, const sl_step_args& a) {
  std::copy_n(a.positions, a.num_tokens, m.positions.begin());
  std::copy_n(a.context_lens, a.num_seqs, m.context_lens.begin());
  for (int s = 0; s < a.num_seqs; ++s) {
    for (int t = a.query_start[s]; t < a.query_start[s + 1]; ++t) {
      m.token_ids[t] = a.token_ids[t] == -1 ? m.slots[a.slots[s]] : a.token_ids[t];
      m.token_seq[t] = s;
    }
  }
}

template <class E>
Run<E> make_run(Model& m, const Batch* batch, const sl_kv* kv, int64_t* clock) {
  Run<E> run{};
  run.batch = batch;
  run.weights = m.weights;
  run.token_arena = static_cast<char*>(m.token_arena.data());
  run.row_arena = static_cast<char*>(m.row_arena.data());
  run.max_tokens = m.args.max_tokens;
  run.max_rows = m.args.max_sample_rows;
  if (kv) {
    run.kv_base = kv->kv_base;
    run.page_stride = kv->page_stride;
    run.head_stride = kv->head_stride;
    run.page_tokens = kv->page_tokens;
  }
  run.cos = m.cos();
  run.sin = m.sin();
  run.windows = m.windows.data();
  run.eps = m.args.rms_eps;
  run.qk_eps = m.args.qk_eps;
  run.scale = m.args.attention_scale;
  run.head_eps = run.eps;
  run.parts = static_cast<float*>(m.parts_arena.data());
  run.parts_floats = m.parts_floats;
  run.counters = m.counters.data();
  run.clock = clock;
  run.ranks = &m.ranks;
  return run;
}

// Final-normed hidden states x * rstd * weight of every token, fp32.
template <class E>
void copy_hidden(Worker& w, const ModelSpec& spec, const Run<E>& run, float* out) {
  const float* ssq = run.template buffer<float>(spec.final_ssq);
  const float* weight = run.template weight<float>(spec.final_norm);
  w.for_each_static(run.batch->num_tokens, [&](int t) {
    const float rstd = row_rstd(ssq, t, spec.Hp, spec.H, run.eps);
    const float* x = run.template buffer<float>(spec.final_x) + int64_t(t) * spec.Hp;
    for (int i = 0; i < spec.H; ++i) out[int64_t(t) * spec.H + i] = x[i] * rstd * weight[i];
  });
}

// The real columns of each row of logits.
template <class E>
void copy_logits(Worker& w, const ModelSpec& spec, const Run<E>& run, float* out) {
  const float* logits = run.template row_buffer<float>(spec.logits);
  w.for_each_static(run.num_rows, [&](int r) {
    std::memcpy(out + int64_t(r) * spec.V, logits + int64_t(r) * spec.Vp, sizeof(float) * spec.V);
  });
}

// What step number `step` of the call draws, and where to.
inline SampleJob sample_job(Model& m, const sl_step_args& a, int step) {
  const ModelSpec& spec = *m.spec;
  const char* rows = static_cast<const char*>(m.row_arena.data());
  const int64_t at = int64_t(step) * a.num_sample_rows;
  const auto from = [](auto* out, int64_t offset) { return out ? out + offset : out; };
  return {m.sampling.data(),
          a.num_sample_rows,
          reinterpret_cast<const float*>(rows + spec.logits * m.args.max_sample_rows),
          spec.Vp,
          spec.V,
          a.max_logprobs,
          a.out_tokens + at,
          from(a.out_logprobs, at),
          from(a.out_ranks, at),
          from(a.out_top_ids, at * a.max_logprobs),
          from(a.out_top_logprobs, at * a.max_logprobs),
          (a.flags & SL_STEP_LOGITS) == 0};
}

// Between two steps of a call, by one worker: whether there is another, and if so, every sequence
// moved on to the token it drew in step number `step`. Row s is sequence s (check_repeat).
inline bool advance(Model& m, const sl_step_args& a, int step) {
  if (m.ranks.status != 0) return false;
  if (m.sampler.first_not_finite() >= 0 || m.sampler.first_without_token() >= 0) return false;
  const int32_t* drawn = a.out_tokens + int64_t(step) * a.num_sample_rows;
  for (int r = 0; r < a.num_sample_rows; ++r)
    if (is_stop(m.sampling[r], drawn[r])) return false;
  for (int s = 0; s < a.num_seqs; ++s) {
    m.token_ids[s] = drawn[s];
    m.positions[s] += 1;
    m.context_lens[s] += 1;
    m.sampling[s].position += 1;
  }
  m.sampler.begin(sample_job(m, a, step + 1));
  return true;
}

// After the workers: rows that have no token, or the slots of those that have.
inline sl_status finish_sampling(Model& m, const sl_step_args& a, int steps) {
  if (const int r = m.sampler.first_not_finite(); r >= 0) return not_finite(r, a.sample_rows[r]);
  if (const int r = m.sampler.first_without_token(); r >= 0) return nothing_allowed(r);
  if (!a.slots) return SL_OK;
  for (int r = 0; r < a.num_sample_rows; ++r)
    if (const int slot = a.slots[m.token_seq[a.sample_rows[r]]]; slot >= 0)
      m.slots[slot] = a.out_tokens[int64_t(steps - 1) * a.num_sample_rows + r];
  return SL_OK;
}

template <class Net>
sl_status step(Model& m, const sl_step_args& a) {
  using E = typename Net::Element;
  SL_TRY(check_step(m, a));
  take_tokens(m, a);
  const ModelSpec& spec = *m.spec;
  const Batch batch{a.num_tokens,       a.num_seqs,    m.token_ids.data(),
                    m.positions.data(), a.query_start, m.context_lens.data(),
                    m.token_seq.data(), a.page_table,  a.page_table_stride};
  int64_t clock = now_ns();
  Run<E> run = make_run<E>(m, &batch, a.kv, &clock);
  const bool sample = a.num_sample_rows > 0 && a.flags & SL_STEP_SAMPLE;
  const bool logits = a.num_sample_rows > 0 && a.flags & SL_STEP_LOGITS;
  run.rows = a.sample_rows;
  run.num_rows = sample || logits ? a.num_sample_rows : 0;
  if (sample) {
    m.sampler.begin(sample_job(m, a, 0));
    run.sampler = &m.sampler;
  }
  m.ranks.status = 0;
  int steps = 1;      // begun; written by worker 0 between barriers, as is `more`
  bool more = false;  // whether another step follows
  const bool ran = m.pool->run([&](Worker& w) {
    for (int left = a.num_steps;;) {
      Net::forward(w, run);
      if (a.flags & SL_STEP_HIDDEN) copy_hidden(w, spec, run, a.out_hidden);
      if (run.num_rows > 0) Net::head(w, run);
      if (logits) copy_logits(w, spec, run, a.out_logits);
      if (sample) {
        m.sampler.scan(w);
        w.barrier();
        m.sampler.draw(w);
      }
      if (--left == 0) return;
      run.done(w, spec.num_ops - 1, 0);
      if (w.id == 0 && (more = advance(m, a, steps - 1))) ++steps;
      w.barrier();
      if (!more) return;
    }
  });
  if (!ran) return forked();
  m.counters[spec.num_ops - 1].ns += now_ns() - clock;  // copies and sampling end the last op
  if (m.ranks.status != 0)
    return fail(SL_REDUCE, "the sum over %d ranks failed on rank %d: reduce returned %d",
                spec.num_ranks, m.ranks.rank, m.ranks.status);
  if (a.out_num_steps) *a.out_num_steps = steps;
  return sample ? finish_sampling(m, a, steps) : SL_OK;
}

template <class Net>
sl_status head(Model& m, const sl_head_args& a) {
  using E = typename Net::Element;
  const ModelSpec& spec = *m.spec;
  SL_TRY(check_range("num_rows", a.num_rows, 1, INT32_MAX));
  SL_TRY(check_not_null(a.hidden, "hidden"));
  SL_TRY(check_not_null(a.out_logits, "out_logits"));
  int64_t clock = now_ns();
  Run<E> run = make_run<E>(m, nullptr, nullptr, &clock);
  run.rows = m.identity.data();
  run.head_eps = 0;  // with ssq as below, rstd is exactly 1
  using F = typename Net::Head;
  const Rows<F> rows{run.template buffer<char>(spec.final_xw), spec.xw_pitch};
  float* sums = run.template buffer<float>(spec.final_ssq);
  for (int first = 0; first < a.num_rows; first += run.num_rows) {
    run.num_rows = std::min(m.args.max_sample_rows, a.num_rows - first);
    const bool ran = m.pool->run([&](Worker& w) {
      w.for_each_static(run.num_rows, [&](int r) {
        const float* from = a.hidden + int64_t(first + r) * spec.H;
        float* ssq = sums + int64_t(r) * (spec.Hp / kLanes);
        for (int n = 0; n < spec.Hp; n += F::kUnit) {
          float xw[F::kUnit];
          for (int i = 0; i < F::kUnit; ++i) xw[i] = n + i < spec.H ? from[n + i] : 0.0f;
          F::store(rows.row(r), spec.Hp, n, xw);
        }
        for (int i = 0; i < spec.Hp / kLanes; ++i)
          ssq[i] = i == 0 ? static_cast<float>(spec.H) : 0.0f;
      });
      w.barrier();
      Net::head(w, run);
      copy_logits(w, spec, run, a.out_logits + int64_t(first) * spec.V);
    });
    if (!ran) return forked();
  }
  return SL_OK;
}

}  // namespace sl
