// What is only enqueued, on a stream and in memory of the caller's: sl_enqueue, sl_enqueue_head;
// and sl_head, which waits for the same launches.
#pragma once
#include "step.h"

namespace slg {

// The caller's stream, and memory in place of the workspace's, until the end of a scope.
class Borrowed {
 public:
  Borrowed(Model& m, void* stream) : m_(m), stream_(std::exchange(m.stream, stream)) {}
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() {
    for (const auto& [place, own] : kept_) *place = own;
    m_.stream = stream_;
  }

  // Nothing where `memory` is null.
  void put(const char* name, const void* memory) {
    for (size_t i = 0; memory && i < m_.table.buffers.size(); ++i)
      if (m_.table.buffers[i].name == name)
        kept_.emplace_back(&m_.buffers[i], std::exchange(m_.buffers[i], const_cast<void*>(memory)));
  }

 private:
  Model& m_;
  void* stream_;
  std::vector<std::pair<void**, void*>> kept_;
};

inline sl_status check_aligned(const char* name, const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 == 0) return SL_OK;
  return fail(SL_INVALID, "%s is at %p, which is not aligned to 16 bytes", name, p);
}

inline sl_status check_hidden(const Model& m, const sl_enqueue_args& a) {
  if (!a.out_hidden) return SL_OK;
  SL_TRY(check_aligned("out_hidden", a.out_hidden));
  // Kernels reach 2 GB from a pointer.
  const int most = INT32_MAX / 2 / a.num_tokens;
  SL_TRY(sl::check_range("hidden_stride", a.hidden_stride, m.shape.H, most));
  if (a.hidden_stride % 16)
    return fail(SL_INVALID, "hidden_stride is %d and must be a multiple of 16 elements",
                a.hidden_stride);
  return SL_OK;
}

inline sl_status check_enqueue(const Model& m, const sl_enqueue_args& a) {
  SL_TRY(sl::check_range("num_tokens", a.num_tokens, 1, m.args.max_tokens));
  SL_TRY(sl::check_range("num_seqs", a.num_seqs, 1, m.args.max_seqs));
  SL_TRY(sl::check_range("num_sample_rows", a.num_sample_rows, 0, m.args.max_sample_rows));
  if (a.is_decode && a.num_tokens != a.num_seqs)
    return fail(SL_INVALID, "is_decode with %d tokens of %d sequences", a.num_tokens, a.num_seqs);
  SL_TRY(sl::check_range("page_table_stride", a.page_table_stride, 1, INT32_MAX));
  SL_TRY(sl::check_range("page_tokens", a.page_tokens, 1, INT32_MAX));
  const void* const needed[] = {a.token_ids,   a.positions,    a.kv_slots, a.page_table,
                                a.query_start, a.context_lens, a.k_base,   a.v_base};
  for (const void* p : needed)
    if (!p) return fail(SL_INVALID, "sl_enqueue: a required pointer is null");
  if (a.num_sample_rows > 0 && (!a.sample_rows || !a.out_logits))
    return fail(SL_INVALID, "sl_enqueue: sample_rows and out_logits are needed to sample");
  if (a.page_stride % 16 || a.token_stride % 16 || a.head_stride % 16)
    return fail(SL_INVALID, "strides of KV pages must be multiples of 16 elements");
  // Kernels have a token's and a head's place in a page in 32 bits.
  const int64_t reach =
      int64_t{a.page_tokens} * a.token_stride + int64_t{m.shape.Hkv} * a.head_stride;
  if (reach > INT32_MAX)
    return fail(SL_INVALID, "token_stride %d and head_stride %d lead %lld elements into a page",
                a.token_stride, a.head_stride, (long long)reach);
  SL_TRY(check_aligned("out_logits", a.out_logits));
  return check_hidden(m, a);
}

// Inputs of rows that are drawn greedily and remembered nowhere.
inline void draw_greedily(Model& m, const void* rows) {
  m.inputs.rows = const_cast<void*>(rows);
  m.inputs.slots = m.zeros;
  m.inputs.row_slots = m.minus_ones;
  m.inputs.temperature = m.inputs.seeds = m.inputs.draws = m.zeros;
}

inline sl_status enqueue(Model& m, const sl_enqueue_args& a) {
  SL_TRY(check_ready(m));
  SL_TRY(check_enqueue(m, a));
  SL_TRY(m.driver.make_current());
  PagedKv kv;
  kv.k.assign(a.k_base, a.k_base + m.shape.num_layers);
  kv.v.assign(a.v_base, a.v_base + m.shape.num_layers);
  kv.page_tokens = a.page_tokens;
  kv.page_stride = a.page_stride;
  kv.token_stride = a.token_stride;
  kv.head_stride = a.head_stride;
  set_kv(m, kv);
  const Sizes sizes{a.num_tokens, a.num_sample_rows, a.num_seqs, a.out_hidden ? a.num_tokens : 0};
  set_sizes(m, sizes, a.page_table_stride);
  if (a.out_hidden) m.values.hidden_stride = a.hidden_stride;
  const auto mutable_ptr = [](const void* p) { return const_cast<void*>(p); };
  Inputs& in = m.inputs;
  in = {};
  in.tokens = mutable_ptr(a.token_ids);
  in.positions = mutable_ptr(a.positions);
  in.kv_slots = mutable_ptr(a.kv_slots);
  in.page_table = mutable_ptr(a.page_table);
  in.query_start = mutable_ptr(a.query_start);
  in.context_lens = mutable_ptr(a.context_lens);
  draw_greedily(m, a.sample_rows);
  Borrowed borrowed(m, a.stream);
  borrowed.put("logits", a.out_logits);
  borrowed.put("ids", a.out_tokens);
  borrowed.put("hidden", a.out_hidden);
  return launch_all(m, sizes, a.is_decode != 0);
}

// The head alone, on `rows` final-normed hidden states: of all launches those that rows are for.
inline sl_status launch_head(Model& m, int rows) {
  const Sizes sizes{0, rows, 0};
  set_sizes(m, sizes, 0);
  m.values.is_normed = 1;
  m.inputs = {};
  draw_greedily(m, m.every_row);
  return launch_all(m, sizes, false);
}

inline sl_status enqueue_head(Model& m, const sl_enqueue_head_args& a) {
  SL_TRY(check_ready(m));
  SL_TRY(sl::check_range("num_rows", a.num_rows, 1, m.args.max_sample_rows));
  SL_TRY(sl::check_not_null(a.hidden, "hidden"));
  SL_TRY(sl::check_not_null(a.out_logits, "out_logits"));
  SL_TRY(check_aligned("hidden", a.hidden));
  SL_TRY(check_aligned("out_logits", a.out_logits));
  SL_TRY(m.driver.make_current());
  Borrowed borrowed(m, a.stream);
  borrowed.put("xw", a.hidden);
  borrowed.put("logits", a.out_logits);
  borrowed.put("ids", a.out_tokens);
  return launch_head(m, a.num_rows);
}

inline sl_status head(Model& m, const sl_head_args& a) {
  SL_TRY(check_ready(m));
  SL_TRY(sl::check_range("num_rows", a.num_rows, 1, INT32_MAX));
  SL_TRY(sl::check_not_null(a.hidden, "hidden"));
  SL_TRY(sl::check_not_null(a.out_logits, "out_logits"));
  SL_TRY(m.driver.make_current());
  SL_TRY(check_may_wait(m, "sl_head", "sl_enqueue_head"));
  const int64_t H = m.shape.H, V = m.shape.V;
  const int most = std::min(m.args.max_sample_rows, m.args.max_tokens);
  Borrowed borrowed(m, m.stream);
  borrowed.put("xw", buffer(m, "hidden"));
  for (int first = 0, rows; first < a.num_rows; first += rows) {
    rows = std::min(most, a.num_rows - first);
    std::vector<sl::bf16> rounded(rows * H);
    std::transform(a.hidden + first * H, a.hidden + (first + rows) * H, rounded.begin(),
                   sl::from_float<sl::bf16>);
    SL_TRY(m.driver.check(
        m.driver.to_device(buffer(m, "hidden"), rounded.data(), 2 * rounded.size(), m.stream),
        "copying hidden states"));
    SL_TRY(launch_head(m, rows));
    for (int r = 0; r < rows; ++r) SL_TRY(copy_logits(m, r, a.out_logits + (first + r) * V));
    SL_TRY(m.driver.check(m.driver.stream_wait(m.stream), "running the head"));
  }
  return SL_OK;
}

}  // namespace slg
