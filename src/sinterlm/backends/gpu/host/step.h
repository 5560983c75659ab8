// sl_step. A step copies one block of inputs to the device, launches, copies ids back, and draws on
// the host those rows that the device does not: all that want log-probabilities, filters,
// penalties, biases or masks.
#pragma once
#include "open.h"
#include "sinterlm/calls.h"
#include "sinterlm/simd.h"
#include "sinterlm/step_check.h"

namespace slg {

// What moves from one step of a call to the next.
struct Cursor {
  std::vector<int32_t> token_ids, positions, context_lens;
};

inline bool drawn_on_host(const sl_sampling& s, int V) {
  return s.num_logprobs >= 0 || sl::changes_logits(s) || (s.temperature > 0 && sl::filters(s, V));
}

inline int pages_of(int tokens, int page_tokens) {
  return (tokens + page_tokens - 1) / page_tokens;
}

// Pages that rows of the page table have room for: a power of two, so that few graphs do.
inline int table_stride(const Model& m, const sl_step_args& a, const Cursor& at) {
  int most = 1, stride = 1;
  for (int context : at.context_lens) most = std::max(most, pages_of(context, a.kv->page_tokens));
  while (stride < most) stride *= 2;
  return std::min(stride, m.max_pages());
}

// Points the inputs at their places for such a step; returns the bytes of all.
inline int64_t place_inputs(Model& m, const Sizes& sizes, int stride) {
  const std::vector<int64_t> bytes = input_bytes(sizes, stride);
  int64_t at = 0;
  size_t i = 0;
#define SL_PLACE(name)                 \
  m.inputs.name = m.input_region + at; \
  at += (bytes[i++] + 15) / 16 * 16;
  SL_INPUTS(SL_PLACE)
#undef SL_PLACE
  return at;
}

// Where the host writes what the device will find at `input`.
template <class T>
inline T* staged(const Model& m, void* input) {
  return reinterpret_cast<T*>(m.staging.data() + (static_cast<char*>(input) - m.input_region));
}

inline void stage(Model& m, const sl_step_args& a, const Cursor& at, const Sizes& sizes, int stride,
                  bool sample) {
  const Inputs& in = m.inputs;
  std::copy(at.token_ids.begin(), at.token_ids.end(), staged<int32_t>(m, in.tokens));
  std::copy(at.positions.begin(), at.positions.end(), staged<int32_t>(m, in.positions));
  std::copy_n(a.query_start, sizes.S + 1, staged<int32_t>(m, in.query_start));
  std::copy(at.context_lens.begin(), at.context_lens.end(), staged<int32_t>(m, in.context_lens));
  std::vector<int> owner(sizes.T);
  for (int s = 0; s < sizes.S; ++s) {
    const int32_t* from = a.page_table + int64_t(s) * a.page_table_stride;
    const int pages = pages_of(at.context_lens[s], a.kv->page_tokens);
    int32_t* to = staged<int32_t>(m, in.page_table) + int64_t(s) * stride;
    std::copy_n(from, pages, to);
    std::fill(to + pages, to + stride, 0);
    for (int t = a.query_start[s]; t < a.query_start[s + 1]; ++t) {
      const int pos = at.positions[t];
      owner[t] = s;
      staged<int32_t>(m, in.slots)[t] = a.slots ? std::max(0, a.slots[s]) : 0;
      staged<int32_t>(m, in.kv_slots)[t] =
          from[pos / a.kv->page_tokens] * a.kv->page_tokens + pos % a.kv->page_tokens;
    }
  }
  for (int r = 0; r < sizes.R; ++r) {
    const sl_sampling* s = sample ? &m.sampling[r] : nullptr;
    const bool draws = s && !drawn_on_host(*s, m.shape.V);
    staged<int32_t>(m, in.rows)[r] = a.sample_rows[r];
    staged<int32_t>(m, in.row_slots)[r] = draws && a.slots ? a.slots[owner[a.sample_rows[r]]] : -1;
    staged<int32_t>(m, in.draws)[r] = s ? s->position : 0;
    staged<float>(m, in.temperature)[r] = draws ? s->temperature : 0;
    staged<uint64_t>(m, in.seeds)[r] = s ? s->seed : 0;
  }
}

inline void* buffer(const Model& m, const char* name) {
  for (size_t i = 0; i < m.table.buffers.size(); ++i)
    if (m.table.buffers[i].name == name) return m.buffers[i];
  return nullptr;
}

// The logits of a row from the device into `to`, [V].
inline sl_status copy_logits(Model& m, int row, float* to) {
  const int64_t pitch = (m.shape.V + 63) / 64 * 64;
  char* from = static_cast<char*>(buffer(m, "logits")) + 4 * pitch * row;
  return m.driver.check(m.driver.to_host(to, from, int64_t{4} * m.shape.V, m.stream),
                        "copying logits");
}

// Draws `rows` from their logits with the sampler that CPUs have.
inline sl_status draw_on_host(Model& m, const sl_step_args& a, const std::vector<int>& rows,
                              int64_t first) {
  const int n = static_cast<int>(rows.size()), V = m.shape.V, width = a.max_logprobs;
  if (n == 0) return SL_OK;
  std::vector<sl_sampling> sampling;
  std::vector<int32_t> tokens(n), ranks(n), top_ids(int64_t{n} * width);
  std::vector<float> logprobs(n), top_logprobs(int64_t{n} * width);
  for (int r : rows) sampling.push_back(m.sampling[r]);
  m.sampler.begin({sampling.data(), n, m.logits.data(), V, V, width, tokens.data(), logprobs.data(),
                   ranks.data(), top_ids.data(), top_logprobs.data()});
  const bool ran = m.pool->run([&](sl::Worker& w) {
    m.sampler.scan(w);
    w.barrier();
    m.sampler.draw(w);
  });
  if (!ran) return sl::forked();
  if (const int i = m.sampler.first_not_finite(); i >= 0)
    return sl::not_finite(rows[i], a.sample_rows[rows[i]]);
  if (const int i = m.sampler.first_without_token(); i >= 0) return sl::nothing_allowed(rows[i]);
  for (int i = 0; i < n; ++i) {
    const int64_t at = first + rows[i];
    a.out_tokens[at] = tokens[i];
    if (a.out_logprobs) a.out_logprobs[at] = logprobs[i];
    if (a.out_ranks) a.out_ranks[at] = ranks[i];
    std::copy_n(top_ids.data() + int64_t{i} * width, width, a.out_top_ids + at * width);
    std::copy_n(top_logprobs.data() + int64_t{i} * width, width, a.out_top_logprobs + at * width);
  }
  return SL_OK;
}

// After the launches: what the step draws and shows. Waits for the device.
inline sl_status finish(Model& m, const sl_step_args& a, const Sizes& sizes, int64_t first,
                        bool sample) {
  const int R = sizes.R, V = m.shape.V;
  int32_t* ids = reinterpret_cast<int32_t*>(m.read_back.data());
  float* logprobs = reinterpret_cast<float*>(ids + m.args.max_sample_rows);
  std::vector<int> on_host;
  if (sample) {
    for (int r = 0; r < R; ++r)
      if (drawn_on_host(m.sampling[r], V)) on_host.push_back(r);
    const Driver& d = m.driver;
    SL_TRY(d.check(d.to_host(ids, buffer(m, "ids"), 4 * R, m.stream), "copying tokens"));
    SL_TRY(d.check(d.to_host(logprobs, buffer(m, "logprobs"), 4 * R, m.stream), "copying tokens"));
  }
  m.logits.resize(on_host.size() * V);
  for (size_t i = 0; i < on_host.size(); ++i)
    SL_TRY(copy_logits(m, on_host[i], m.logits.data() + i * V));
  if (R > 0 && a.flags & SL_STEP_LOGITS)
    for (int r = 0; r < R; ++r) SL_TRY(copy_logits(m, r, a.out_logits + int64_t{r} * V));
  std::vector<sl::bf16> hidden(int64_t{sizes.N} * m.shape.H);
  if (sizes.N > 0)
    SL_TRY(m.driver.check(
        m.driver.to_host(hidden.data(), buffer(m, "hidden"), 2 * hidden.size(), m.stream),
        "copying hidden states"));
  SL_TRY(m.driver.check(m.driver.stream_wait(m.stream), "running the step"));
  std::transform(hidden.begin(), hidden.end(), a.out_hidden,
                 [](sl::bf16 v) { return sl::to_float(v); });
  if (!sample) return SL_OK;
  for (int r = 0; r < R; ++r) {
    if (drawn_on_host(m.sampling[r], V)) continue;
    if (std::isnan(logprobs[r])) return sl::not_finite(r, a.sample_rows[r]);
    const int64_t at = first + r;
    a.out_tokens[at] = ids[r];
    if (a.out_logprobs) a.out_logprobs[at] = NAN;
    if (a.out_ranks) a.out_ranks[at] = 0;
    for (int i = 0; i < a.max_logprobs; ++i) {
      a.out_top_ids[at * a.max_logprobs + i] = -1;
      a.out_top_logprobs[at * a.max_logprobs + i] = NAN;
    }
  }
  return draw_on_host(m, a, on_host, first);
}

// Slots remember what was drawn; the device knows already, but for rows that the host drew.
inline sl_status remember(Model& m, const sl_step_args& a, int64_t first) {
  if (!a.slots) return SL_OK;
  bool behind = false;
  for (int r = 0, s = 0; r < a.num_sample_rows; ++r) {
    while (a.query_start[s + 1] <= a.sample_rows[r]) ++s;
    if (a.slots[s] < 0) continue;
    m.slots[a.slots[s]] = a.out_tokens[first + r];
    behind |= drawn_on_host(m.sampling[r], m.shape.V);
  }
  if (!behind) return SL_OK;
  SL_TRY(m.driver.check(m.driver.to_device(m.drawn, m.slots.data(), 4 * m.slots.size(), m.stream),
                        "slots"));
  return m.driver.check(m.driver.stream_wait(m.stream), "slots");
}

// Whether another step follows; if so, every sequence moved on to the token it drew.
inline bool advance(Model& m, const sl_step_args& a, int64_t first, Cursor* at) {
  for (int r = 0; r < a.num_sample_rows; ++r)
    if (sl::is_stop(m.sampling[r], a.out_tokens[first + r])) return false;
  for (int s = 0; s < a.num_seqs; ++s) {
    at->token_ids[s] = a.out_tokens[first + s];
    ++at->positions[s];
    ++at->context_lens[s];
    ++m.sampling[s].position;
  }
  return true;
}

inline PagedKv paged(const Model& m, const sl_kv& kv) {
  PagedKv p;
  p.k.assign(kv.kv_base, kv.kv_base + kv.num_layers);
  const int64_t half = int64_t{kv.page_tokens} * m.shape.D * m.kv_bytes();
  for (void* k : p.k) p.v.push_back(static_cast<char*>(k) + half);
  p.page_tokens = kv.page_tokens;
  p.page_stride = kv.page_stride;
  p.token_stride = m.shape.D;
  p.head_stride = static_cast<int32_t>(kv.head_stride);
  return p;
}

inline sl_status run_step(Model& m, const sl_step_args& a, const Cursor& at, int64_t first) {
  const bool wanted = a.num_sample_rows > 0 && a.flags & (SL_STEP_SAMPLE | SL_STEP_LOGITS);
  const bool sample = wanted && a.flags & SL_STEP_SAMPLE;
  const Sizes sizes{a.num_tokens, wanted ? a.num_sample_rows : 0, a.num_seqs,
                    a.flags & SL_STEP_HIDDEN ? a.num_tokens : 0};
  const int stride = table_stride(m, a, at);
  set_sizes(m, sizes, stride);
  const int64_t bytes = place_inputs(m, sizes, stride);
  stage(m, a, at, sizes, stride, sample);
  SL_TRY(m.driver.check(m.driver.to_device(m.input_region, m.staging.data(), bytes, m.stream),
                        "copying inputs"));
  SL_TRY(run_launches(m, sizes, a.num_tokens == a.num_seqs));
  if (m.last_launch > 0) {
    if (sample) std::fill_n(a.out_tokens + first, sizes.R, -1);
    return m.driver.check(m.driver.stream_wait(m.stream), "running a part of the step");
  }
  SL_TRY(finish(m, a, sizes, first, sample));
  return sample ? remember(m, a, first) : SL_OK;
}

inline sl_status check_ready(const Model& m) {
  if (m.driver.failed())
    return fail(SL_INTERNAL,
                "the device failed in an earlier step; close the model and open it "
                "again, in a new process if that fails");
  if (!m.workspace) return fail(SL_INVALID, "sl_bind comes before the first step");
  return SL_OK;
}

inline sl_status check_may_wait(const Model& m, const char* call, const char* instead) {
  bool capturing = false;
  SL_TRY(is_capturing(m, &capturing));
  if (!capturing) return SL_OK;
  return fail(SL_INVALID, "%s waits for the device, and its stream is being captured; use %s", call,
              instead);
}

inline sl_status step(Model& m, const sl_step_args& a) {
  SL_TRY(check_ready(m));
  SL_TRY(sl::check_step(m, a));
  SL_TRY(m.driver.make_current());
  SL_TRY(check_may_wait(m, "sl_step", "sl_enqueue"));
  set_kv(m, paged(m, *a.kv));
  Cursor at{{a.token_ids, a.token_ids + a.num_tokens},
            {a.positions, a.positions + a.num_tokens},
            {a.context_lens, a.context_lens + a.num_seqs}};
  int steps = 0;
  for (;;) {
    const int64_t first = int64_t{steps} * a.num_sample_rows;
    const sl_status status = run_step(m, a, at, first);
    // Logits that are not finite, or a mask that allows nothing, leave the device as it was.
    if (status != SL_OK) return status;
    if (++steps == a.num_steps || !advance(m, a, first, &at)) break;
  }
  if (a.out_num_steps) *a.out_num_steps = steps;
  return SL_OK;
}

}  // namespace slg
