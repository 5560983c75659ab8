// The launches of a step, eagerly or as a graph that was captured once for its sizes.
#pragma once
#include "model.h"

namespace slg {

constexpr size_t kMostGraphs = 64;

// One of the vendor's GEMMs, with the arguments of the launch.
inline sl_status launch_product(const Model& m, size_t launch, int kernel, int rows) {
  void* args[4];  // a, w, sums, workspace
  for (int i = 0; i < 4; ++i) args[i] = *static_cast<void**>(m.blocks[launch][i]);
  return m.vendor.multiply(kernel, rows, args[0], args[1], args[2], args[3], m.stream);
}

// Every algorithm of the vendor's GEMM once, on whatever lies there: a library loads its code when
// it first needs it, which a capture does not allow.
inline sl_status warm_products(const Model& m) {
  if (!m.vendor.is_open()) return SL_OK;
#ifdef SL_MUTATE_GEMM_COLD
  return SL_OK;
#endif
  std::set<int> met;
  for (size_t i = 0; i < m.table.launches.size(); ++i)
    for (const Choice& c : m.choices[m.slot_of_launch[i]]) {
      if (c.kernel == kLeftOut || !m.table.kernels[c.kernel].is_vendor()) continue;
      if (!met.insert(c.kernel).second) continue;
      for (int rows = m.vendor.rows_of(m.table.fact("vendor_least_rows"));;
           rows = m.vendor.rows_of(rows + 1)) {
        SL_TRY(launch_product(m, i, c.kernel, rows));
        if (rows == m.vendor.most_rows()) break;
      }
    }
  return SL_OK;
}

// Everything of one step, on the model's stream: neither waits nor allocates.
inline sl_status launch_all(Model& m, const Sizes& sizes, bool is_decode) {
  constexpr int kNoneFits = -2;
  std::vector<int> kernel_of(m.choices.size(), kNoneFits);
  for (size_t slot = 0; slot < kernel_of.size(); ++slot)
    for (const Choice& c : m.choices[slot])
      if (kernel_of[slot] == kNoneFits && c.fits(sizes, is_decode)) kernel_of[slot] = c.kernel;
  const unsigned warp = m.table.fact("warp");
  for (size_t i = 0; i < m.table.launches.size(); ++i) {
    if (m.last_launch > 0 && (int(i) < m.first_launch || int(i) >= m.last_launch)) continue;
    const Launch& launch = m.table.launches[i];
    const int number = kernel_of[m.slot_of_launch[i]];
    if (number == kLeftOut) continue;
    if (number == kNoneFits)
      return fail(SL_INTERNAL, "no kernel of %s fits %d tokens", launch.slot.c_str(), sizes.T);
    const Kernel& kernel = m.table.kernels[number];
    unsigned grid[3];
    for (int axis = 0; axis < 3; ++axis) grid[axis] = kernel.grid[axis].count(sizes);
#ifdef SL_MUTATE_SMALL_GRID
    if (kernel.name == "norm_gate_up_act") grid[0] -= 1;
#endif
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) continue;  // no row is sampled
    if (kernel.is_vendor()) {
      SL_TRY(launch_product(m, i, number, sizes.T));
      continue;
    }
    const int code =
        m.driver.launch(m.functions[number], grid[0], grid[1], grid[2], kernel.warps * warp, 1, 1,
                        kernel.shared, m.stream, m.blocks[i].data(), nullptr);
    if (code == 0) continue;
    char doing[160];
    snprintf(doing, sizeof doing, "launching %s of layer %d", launch.slot.c_str(), launch.layer);
    return m.driver.check(code, doing);
  }
  return SL_OK;
}

// Scalars and KV addresses of a step. Graphs hold the old ones where pages moved.
inline void set_kv(Model& m, const PagedKv& kv) {
  if (!(m.kv == kv)) {
#ifndef SL_MUTATE_STALE_KV
    m.drop_graphs();
#endif
    std::copy(kv.k.begin(), kv.k.end(), m.kv.k.begin());  // in place: blocks point here
    std::copy(kv.v.begin(), kv.v.end(), m.kv.v.begin());
    m.kv.page_tokens = kv.page_tokens;
    m.kv.page_stride = kv.page_stride;
    m.kv.token_stride = kv.token_stride;
    m.kv.head_stride = kv.head_stride;
  }
  m.values.page_tokens = kv.page_tokens;
  m.values.page_stride = kv.page_stride;
  m.values.token_stride = kv.token_stride;
  m.values.head_stride = kv.head_stride;
}

inline void set_sizes(Model& m, const Sizes& sizes, int table_stride) {
  m.values.num_tokens = sizes.T;
  m.values.num_rows = sizes.R;
  m.values.num_seqs = sizes.S;
  m.values.table_stride = table_stride;
  m.values.hidden_stride = m.shape.H;
  m.values.is_normed = 0;
}

inline sl_status is_capturing(const Model& m, bool* out) {
  int status = 0;
  SL_TRY(m.driver.check(m.driver.is_capturing(m.stream, &status), "asking for the stream"));
  *out = status != 0;
  return SL_OK;
}

// Ends a capture, and makes a graph of it unless what was captured `launched` badly.
inline sl_status end_capture(Model& m, sl_status launched, void** out) {
  void* graph = nullptr;
  const int ended = m.driver.capture_end(m.stream, &graph);
  if (launched != SL_OK) {
    if (graph) m.driver.captured_release(graph);
    return launched;
  }
  SL_TRY(m.driver.check(ended, "ending a graph"));
  const int made = m.driver.graph_make(out, graph, 0);
  m.driver.captured_release(graph);
  return m.driver.check(made, "making a graph");
}

inline sl_status capture(Model& m, const GraphKey& key, bool is_decode, void** out) {
  SL_TRY(m.driver.check(m.driver.capture_begin(m.stream, kThreadLocal), "beginning a graph"));
#ifdef SL_MUTATE_WAIT_IN_CAPTURE
  m.driver.stream_wait(m.stream);
#endif
#ifdef SL_MUTATE_ALLOCATE_IN_CAPTURE
  Memory more;
  more.allocate(m.driver, 1 << 20, "nothing");
#endif
  return end_capture(m, launch_all(m, key.sizes, is_decode), out);
}

// As launch_all, by a graph where every sequence has one token and such a step has been run before.
inline sl_status run_launches(Model& m, const Sizes& sizes, bool is_decode) {
  const GraphKey key{sizes, m.values.table_stride};
  ++m.steps;
  if (!m.graphs || m.last_launch > 0 || !is_decode || m.stream != m.own_stream ||
      m.met.insert(key).second)
    return launch_all(m, sizes, is_decode);
  auto found = m.captured.find(key);
  if (found == m.captured.end()) {
    if (m.captured.size() >= kMostGraphs) m.drop_graphs();
    void* graph = nullptr;
    SL_TRY(capture(m, key, is_decode, &graph));
    found = m.captured.emplace(key, graph).first;
  }
  ++m.graph_launches;
  return m.driver.check(m.driver.graph_launch(found->second, m.stream), "launching a graph");
}

}  // namespace slg
