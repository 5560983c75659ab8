// The time of one launch, by events around a graph of many: as a step's launches run, without what
// the host needs to ask for each.
#pragma once
#include <numeric>

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

inline bool reads_pages(const Launch& launch) {
  const auto& args = launch.args;
  return std::find(args.begin(), args.end(), "input:page_table") != args.end();
}

inline int64_t pages_of_step(const sl_time_args& a) {
  return int64_t{a.num_seqs} * pages_of(a.context, a.kv->page_tokens);
}

inline sl_status check_time(const Model& m, const sl_time_args& a) {
  SL_TRY(check_ready(m));
  SL_TRY(sl::check_range("launch", a.launch, 0, static_cast<int>(m.table.launches.size()) - 1));
  SL_TRY(sl::check_range("num_tokens", a.num_tokens, 1, m.args.max_tokens));
  SL_TRY(sl::check_range("num_sample_rows", a.num_sample_rows, 0, m.args.max_sample_rows));
  SL_TRY(sl::check_range("num_seqs", a.num_seqs, 1, std::min(a.num_tokens, m.args.max_seqs)));
  if (a.num_tokens % a.num_seqs != 0)
    return fail(SL_INVALID, "%d tokens are no multiple of %d sequences", a.num_tokens, a.num_seqs);
  SL_TRY(sl::check_range("context", a.context, a.num_tokens / a.num_seqs, m.args.max_model_len));
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
  if (pages_of_step(a) > a.kv->num_pages)
    return fail(SL_INVALID, "%d pages of %d tokens have no room for %d sequences of %d",
                a.kv->num_pages, a.kv->page_tokens, a.num_seqs, a.context);
  return SL_OK;
}

// A number to multiply a page's by so that the `pages` of a step lie anywhere among themselves, as
// they do after a while.
inline int64_t scattering(int64_t pages) {
  int64_t by = 7919;
  while (std::gcd(by, pages) != 1) ++by;
  return by;
}

// Inputs of sequences that end with the step's tokens, drawn greedily at the last rows; noise
// elsewhere.
inline sl_status stage_noise(Model& m, const Sizes& sizes, const sl_time_args& a, int stride) {
  const int64_t bytes = place_inputs(m, sizes, stride);
  std::memset(m.staging.data(), 0, bytes);
  const int each = sizes.T / sizes.S, page_tokens = a.kv->page_tokens;
  const int64_t pages = pages_of(a.context, page_tokens), by = scattering(pages * sizes.S);
  for (int s = 0; s < sizes.S; ++s) {
    int32_t* row = staged<int32_t>(m, m.inputs.page_table) + int64_t{s} * stride;
    for (int64_t p = 0; p < pages; ++p)
      row[p] = static_cast<int32_t>((s * pages + p) * by % (pages * sizes.S));
    staged<int32_t>(m, m.inputs.query_start)[s + 1] = (s + 1) * each;
    staged<int32_t>(m, m.inputs.context_lens)[s] = a.context;
    for (int i = 0; i < each; ++i) {
      const int pos = a.context - each + i, t = s * each + i;
      staged<int32_t>(m, m.inputs.positions)[t] = pos;
      staged<int32_t>(m, m.inputs.kv_slots)[t] =
          row[pos / page_tokens] * page_tokens + pos % page_tokens;
    }
  }
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
                      b.name == "q" ? Noise::kUnit : Noise::kWeights, is_positive));
  }
  return m.driver.check(m.driver.stream_wait(m.stream), "copying inputs");
}

inline void move_all(std::vector<void*>& addresses, int64_t bytes) {
  for (void*& address : addresses) address = static_cast<char*>(address) + bytes;
}

// Where a launch finds weights, and pages.
inline void move_sources(Model& m, int64_t weights, int64_t pages) {
  for (void*& address : m.constants) address = static_cast<char*>(address) + weights;
  move_all(m.kv.k, pages);
  move_all(m.kv.v, pages);
}

// `launches` of the launch, one behind the other, as a graph.
inline sl_status capture_train(Model& m, const Sizes& sizes, const sl_time_args& a, void** out) {
  const bool pages_move = reads_pages(m.table.launches[a.launch]);
  const int64_t page_bytes = a.kv->page_stride * m.kv_bytes();
  const int sets = pages_move ? a.kv->num_pages / pages_of_step(a) : 1;
  SL_TRY(m.driver.check(m.driver.capture_begin(m.stream, kThreadLocal), "beginning a graph"));
  sl_status launched = SL_OK;
  for (int i = 0; i < a.launches && launched == SL_OK; ++i) {
    const int64_t weights = i % a.copies * a.copy_bytes;
    const int64_t pages = i % sets * pages_of_step(a) * page_bytes;
    move_sources(m, weights, pages);
    launched = launch_all(m, sizes, sizes.T == sizes.S);
    move_sources(m, -weights, -pages);
  }
  return end_capture(m, launched, out);
}

inline sl_status time_train(Model& m, const Sizes& sizes, const sl_time_args& a) {
  SL_TRY(launch_all(m, sizes, sizes.T == sizes.S));  // so that nothing is loaded while capturing
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
  const Sizes sizes{a.num_tokens, a.num_sample_rows, a.num_seqs};
  int stride = 1;  // as in a step
  while (stride < pages_of(a.context, a.kv->page_tokens)) stride *= 2;
  stride = std::min(stride, m.max_pages());
  set_sizes(m, sizes, stride);
  SL_TRY(stage_noise(m, sizes, a, stride));
  const int first = std::exchange(m.first_launch, a.launch);
  const int last = std::exchange(m.last_launch, a.launch + 1);
  const sl_status timed = time_train(m, sizes, a);
  m.first_launch = first;
  m.last_launch = last;
  return timed;
}

}  // namespace slg
