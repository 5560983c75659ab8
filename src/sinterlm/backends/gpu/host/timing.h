// The time of one launch, by events around a graph of many: as a step's launches run, without what
// the host needs to ask for each.
#pragma once
#include "step.h"

namespace slg {

// An event of the driver, given back at the end.
class Event {
 public:
  Event() = default;
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() {
    if (event_) driver_->event_release(event_);
  }
  sl_status create(const Driver& driver) {
    driver_ = &driver;
    return driver.check(driver.event_create(&event_, 0), "making an event");
  }
  sl_status record(void* stream) const {
    return driver_->check(driver_->event_record(event_, stream), "recording an event");
  }
  // Microseconds from `begin` to this one; both have happened.
  sl_status since(const Event& begin, float* out) const {
    float ms = 0;
    SL_TRY(driver_->check(driver_->event_elapsed(&ms, begin.event_, event_), "reading a clock"));
    *out = 1000 * ms;
    return SL_OK;
  }

 private:
  const Driver* driver_ = nullptr;
  void* event_ = nullptr;
};

// A graph of the driver, given back at the end.
struct Graph {
  explicit Graph(const Driver& d) : driver(d) {}
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    if (graph) driver.graph_release(graph);
  }
  const Driver& driver;
  void* graph = nullptr;
};

inline sl_status check_time(const Model& m, const sl_time_args& a) {
  SL_TRY(check_ready(m));
  SL_TRY(sl::check_range("launch", a.launch, 0, static_cast<int>(m.table.launches.size()) - 1));
  for (const std::string& arg : m.table.launches[a.launch].args)
    if (arg == "input:page_table")
      return fail(SL_INVALID, "launch %d reads the page table, which is not filled here", a.launch);
  SL_TRY(sl::check_range("num_tokens", a.num_tokens, 1, m.args.max_tokens));
  SL_TRY(sl::check_range("num_sample_rows", a.num_sample_rows, 0, m.args.max_sample_rows));
  SL_TRY(sl::check_range("copies", a.copies, 1, 1 << 20));
  SL_TRY(sl::check_range("launches", a.launches, 1, 1 << 20));
  SL_TRY(sl::check_range("samples", a.samples, 1, 1 << 20));
  if (!(a.warmup_us >= 0 && a.warmup_us <= 1e7f))
    return fail(SL_INVALID, "warmup_us is %g and must be in [0, 1e7]", double{a.warmup_us});
  if (!a.kv || !a.out_us) return fail(SL_INVALID, "sl_time: a required pointer is null");
  if (a.copy_bytes < 0 || a.copy_bytes % kAlign != 0 ||
      a.copy_bytes > int64_t(m.args.weights_bytes) / a.copies)
    return fail(SL_INVALID, "%d copies of %lld bytes do not fit into %llu bytes of weights",
                a.copies, (long long)a.copy_bytes, (unsigned long long)m.args.weights_bytes);
  if (int64_t{a.kv->num_pages} * a.kv->page_tokens < a.num_tokens)
    return fail(SL_INVALID, "%d pages of %d tokens have no room for %d", a.kv->num_pages,
                a.kv->page_tokens, a.num_tokens);
  return SL_OK;
}

// Inputs of one sequence from its beginning, drawn greedily at its last rows; noise elsewhere.
inline sl_status stage_noise(Model& m, const Sizes& sizes) {
  const int64_t bytes = place_inputs(m, sizes, 1);
  std::memset(m.staging.data(), 0, bytes);
  for (int t = 0; t < sizes.T; ++t) {
    staged<int32_t>(m, m.inputs.positions)[t] = t % m.args.max_model_len;
    staged<int32_t>(m, m.inputs.kv_slots)[t] = t;
  }
  staged<int32_t>(m, m.inputs.query_start)[1] = sizes.T;
  staged<int32_t>(m, m.inputs.context_lens)[0] = sizes.T;
  for (int r = 0; r < sizes.R; ++r) {
    staged<int32_t>(m, m.inputs.rows)[r] = r % sizes.T;
    staged<int32_t>(m, m.inputs.row_slots)[r] = -1;
  }
  SL_TRY(m.driver.check(m.driver.to_device(m.input_region, m.staging.data(), bytes, m.stream),
                        "copying inputs"));
  for (size_t i = 0; i < m.table.buffers.size(); ++i) {
    const Buffer& b = m.table.buffers[i];
    if (b.name == "counters" || b.name == "attention_counters") continue;
    const bool is_positive = b.name == "ssq";  // sums of squares, of which a root is taken
    SL_TRY(fill_noise(m, static_cast<char*>(m.buffers[i]), b.bytes * m.max_units(b.unit),
                      is_positive));
  }
  return m.driver.check(m.driver.stream_wait(m.stream), "copying inputs");
}

inline void move_weights(Model& m, int64_t bytes) {
  for (void*& address : m.constants) address = static_cast<char*>(address) + bytes;
}

// `launches` of the launch, one behind the other, as a graph.
inline sl_status capture_train(Model& m, const Sizes& sizes, const sl_time_args& a, void** out) {
  SL_TRY(m.driver.check(m.driver.capture_begin(m.stream, kThreadLocal), "beginning a graph"));
  sl_status launched = SL_OK;
  for (int i = 0; i < a.launches && launched == SL_OK; ++i) {
    const int64_t moved = i % a.copies * a.copy_bytes;
    move_weights(m, moved);
    launched = launch_all(m, sizes, false);
    move_weights(m, -moved);
  }
  return end_capture(m, launched, out);
}

inline sl_status time_train(Model& m, const Sizes& sizes, const sl_time_args& a) {
  SL_TRY(launch_all(m, sizes, false));  // so that nothing is loaded while capturing
  SL_TRY(m.driver.check(m.driver.stream_wait(m.stream), "running the launch"));
  Graph train(m.driver);
  SL_TRY(capture_train(m, sizes, a, &train.graph));
  Event begin, end;
  SL_TRY(begin.create(m.driver));
  SL_TRY(end.create(m.driver));
  float warm = 0;
  for (int i = -1; i < a.samples; i += i >= 0 || warm >= a.warmup_us) {
    SL_TRY(begin.record(m.stream));
    SL_TRY(m.driver.check(m.driver.graph_launch(train.graph, m.stream), "launching a graph"));
    SL_TRY(end.record(m.stream));
    SL_TRY(m.driver.check(m.driver.stream_wait(m.stream), "running the launches"));
    float us = 0;
    SL_TRY(end.since(begin, &us));
    warm += us;
    if (i >= 0) a.out_us[i] = us / static_cast<float>(a.launches);
  }
  return SL_OK;
}

inline sl_status time_launch(Model& m, const sl_time_args& a) {
  SL_TRY(check_time(m, a));
  SL_TRY(m.driver.make_current());
  set_kv(m, paged(m, *a.kv));
  const Sizes sizes{a.num_tokens, a.num_sample_rows, 1};
  set_sizes(m, sizes, 1);
  SL_TRY(stage_noise(m, sizes));
  const int first = std::exchange(m.first_launch, a.launch);
  const int last = std::exchange(m.last_launch, a.launch + 1);
  const sl_status timed = time_train(m, sizes, a);
  m.first_launch = first;
  m.last_launch = last;
  return timed;
}

}  // namespace slg
