// A model on a device: weights, workspace, and for each launch a block of arguments that is bound
// once. An argument points to the place where its value is kept, so a step writes a few of these
// and touches no block.
#pragma once
#include <cmath>
#include <list>
#include <locale>
#include <set>

#include "driver.h"
#include "sinterlm/sample.h"
#include "table.h"
#include "vendor_gemm.h"

namespace slg {

// Arrays that a step brings to the device, in the order in which they lie there.
// clang-format off
#define SL_INPUTS(X)                                                                   \
  X(tokens) X(positions) X(slots) X(kv_slots) X(page_table) X(query_start)             \
  X(context_lens) X(rows) X(row_slots) X(draws) X(temperature) X(seeds)
// clang-format on

struct Inputs {
#define SL_FIELD(name) void* name = nullptr;
  SL_INPUTS(SL_FIELD)
#undef SL_FIELD
};

// Numbers that kernels take.
struct Values {
  int32_t num_tokens = 0, num_rows = 0, num_seqs = 0, table_stride = 0, page_tokens = 0;
  int32_t token_stride = 0, head_stride = 0, hidden_stride = 0;  // elements
  int64_t page_stride = 0;                                       // elements
  int32_t is_normed = 0;  // 1: the head is given final-normed rows
};

// KV pages as kernels see them.
struct PagedKv {
  std::vector<void*> k, v;  // [layers] on the device
  int page_tokens = 0;
  int64_t page_stride = 0;
  int32_t token_stride = 0, head_stride = 0;
  bool operator==(const PagedKv& o) const {
    return k == o.k && v == o.v && page_tokens == o.page_tokens && page_stride == o.page_stride &&
           token_stride == o.token_stride && head_stride == o.head_stride;
  }
};

// What a captured step depends on beside its inputs' contents.
struct GraphKey {
  Sizes sizes;
  int table_stride;
  bool operator<(const GraphKey& o) const {
    return std::tie(sizes, table_stride) < std::tie(o.sizes, o.table_stride);
  }
};

// The shape, under the names that sl::check_step looks for.
struct Shape {
  int num_layers, H, Hkv, D, V, kv_width;
};

struct Model {
  Driver driver;
  VendorGemm vendor;
  Table table;
  Shape shape{};
  const Shape* spec = &shape;
  sl_open_args args{};  // pointers in here are not to be followed after sl_open
  void* stream = nullptr;
  void* own_stream = nullptr;
  bool graphs = true;
  int first_launch = 0, last_launch = 0;  // that steps run alone; 0, 0 = all

  Memory own_weights, own_workspace, staging, read_back;
  const char* weights = nullptr;
  char* workspace = nullptr;
  std::list<Memory> kv_blocks;
  std::list<std::vector<void*>> kv_bases;

  std::vector<void*> modules, functions;  // by kernel
  std::vector<int> slot_of_launch;
  std::vector<std::string> slots_of_kernels;
  std::vector<std::vector<Choice>> choices;  // of each slot
  std::vector<std::vector<void*>> blocks;    // of each launch: addresses of its arguments
  std::vector<void*> buffers;                // by buffer of the table
  std::list<void*> constants;                // addresses within the weights
  std::list<float> numbers;                  // that the table tells
  Inputs inputs;
  Values values;
  PagedKv kv;
  void *cos = nullptr, *sin = nullptr, *drawn = nullptr, *null = nullptr;
  void *zeros = nullptr, *minus_ones = nullptr;  // [most rows or tokens], for whoever draws nothing
  void* every_row = nullptr;                     // [max_sample_rows] 0, 1, 2, …
  char* input_region = nullptr;

  std::map<GraphKey, void*> captured;
  std::set<GraphKey> met;  // ran once without a graph, so that nothing is loaded while capturing

  // For sl::check_step and sampling.
  std::vector<sl_sampling> sampling;
  std::vector<int32_t> slots;  // [num_slots] last sampled token, -1 = none yet
  sl::Sampler sampler;
  std::unique_ptr<sl::Pool> pool;
  std::vector<float> logits;              // of rows that are drawn on the host
  std::vector<float> rope_cos, rope_sin;  // [max_model_len][D / 2]
  int64_t steps = 0, graph_launches = 0;

  ~Model() {
    if (own_stream) driver.make_current();  // for what members give back, too
    drop_graphs();
    for (void* module : modules)
      if (module) driver.module_unload(module);
    if (own_stream) driver.stream_destroy(own_stream);
  }

  void drop_graphs() {
    for (const auto& [key, graph] : captured) driver.graph_release(graph);
    captured.clear();
    met.clear();
  }

  int max_units(char unit) const {
    return unit == 'T'   ? args.max_tokens
           : unit == 'R' ? args.max_sample_rows
           : unit == 'S' ? args.max_seqs
                         : 1;
  }
  int kv_bytes() const { return table.fact("kv_bytes"); }  // of an element of pages
  int max_pages() const { return (args.max_model_len + 15) / 16; }
};

constexpr int64_t kAlign = 256;  // of everything in the workspace
inline int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Bytes that each input takes for such a step, in the order of SL_INPUTS.
inline std::vector<int64_t> input_bytes(const Sizes& s, int stride) {
  const int64_t t = 4 * int64_t{s.T}, r = 4 * int64_t{s.R}, q = 4 * int64_t{s.S};
  return {t, t, t, t, q * stride, q + 4, q, r, r, r, r, 2 * r};
}
inline int64_t inputs_total(const Sizes& s, int stride) {
  int64_t total = 0;
  for (int64_t bytes : input_bytes(s, stride)) total += (bytes + 15) / 16 * 16;
  return total;
}

// Where everything of the workspace lies.
struct Layout {
  int64_t arena[4], cos, sin, drawn, zeros, minus_ones, every_row, inputs, total;
};
constexpr char kUnits[] = "TRS1";

inline Layout lay_out(const Model& m) {
  Layout at{};
  const auto place = [&](int64_t bytes) {
    const int64_t begin = at.total;
    at.total += aligned(bytes);
    return begin;
  };
  for (int i = 0; i < 4; ++i)
    at.arena[i] = place(m.table.arena_bytes(kUnits[i]) * m.max_units(kUnits[i]));
  const int64_t rope = int64_t{4} * m.args.max_model_len * (m.shape.D / 2);
  const int64_t most = std::max(m.args.max_tokens, m.args.max_sample_rows);
  at.cos = place(rope);
  at.sin = place(rope);
  at.drawn = place(int64_t{4} * std::max(1, m.args.num_slots));
  at.zeros = place(8 * most);
  at.minus_ones = place(4 * most);
  at.every_row = place(int64_t{4} * m.args.max_sample_rows);
  at.inputs = place(
      inputs_total({m.args.max_tokens, m.args.max_sample_rows, m.args.max_seqs}, m.max_pages()));
  return at;
}

// The place where the value of an argument of a launch is kept; null where the table asks for
// something that there is not.
inline void* place_of(Model& m, const std::string& arg) {
  if (arg == "null") return &m.null;
  const size_t colon = arg.find(':');
  if (colon == std::string::npos) return nullptr;
  const std::string where = arg.substr(0, colon), name = arg.substr(colon + 1);
  if (where == "weight") {
    m.constants.push_back(const_cast<char*>(m.weights) + std::stoll(name));
    return &m.constants.back();
  }
  if (where == "number") {
    std::istringstream text(name);
    text.imbue(std::locale::classic());
    m.numbers.emplace_back();
    return text >> m.numbers.back() ? &m.numbers.back() : nullptr;
  }
  if (where == "buffer") {
    for (size_t i = 0; i < m.table.buffers.size(); ++i)
      if (m.table.buffers[i].name == name) return &m.buffers[i];
    return nullptr;
  }
  if (where == "k" || where == "v") {
    auto& bases = where == "k" ? m.kv.k : m.kv.v;
    const size_t layer = std::stoul(name);
    return layer < bases.size() ? &bases[layer] : nullptr;
  }
#define SL_MATCH(field) \
  if (name == #field) return &m.inputs.field;
  if (where == "input") {
    SL_INPUTS(SL_MATCH)
    if (name == "cos") return &m.cos;
    if (name == "sin") return &m.sin;
    if (name == "drawn") return &m.drawn;
  }
#undef SL_MATCH
#define SL_MATCH(field) \
  if (name == #field) return &m.values.field;
  if (where == "value") {
    SL_MATCH(num_tokens)
    SL_MATCH(num_rows)
    SL_MATCH(num_seqs)
    SL_MATCH(table_stride)
    SL_MATCH(page_tokens)
    SL_MATCH(token_stride)
    SL_MATCH(head_stride)
    SL_MATCH(page_stride)
    SL_MATCH(hidden_stride)
    SL_MATCH(is_normed)
  }
#undef SL_MATCH
  return nullptr;
}

// The argument blocks. Two more pointers follow a kernel's own: scratch memory, which ours lack.
inline sl_status bind_arguments(Model& m) {
  for (const Launch& launch : m.table.launches) {
    std::vector<void*> block;
    for (const std::string& arg : launch.args) {
      void* place = place_of(m, arg);
      if (!place) return fail(SL_IO, "the launch table asks for %s", arg.c_str());
      block.push_back(place);
    }
#ifndef SL_MUTATE_NO_SCRATCH
    block.push_back(&m.null);
    block.push_back(&m.null);
#endif
#ifdef SL_MUTATE_SWAPPED
    std::swap(block[0], block[1]);
#endif
    m.blocks.push_back(std::move(block));
    auto& names = m.slots_of_kernels;
    const auto found = std::find(names.begin(), names.end(), launch.slot);
    m.slot_of_launch.push_back(static_cast<int>(found - names.begin()));
    if (found != names.end()) continue;
    names.push_back(launch.slot);
    m.choices.emplace_back();
    for (const Choice& c : m.table.choices)
      if (c.slot == launch.slot) m.choices.back().push_back(c);
  }
  return SL_OK;
}

// Addresses within the workspace, after it came or moved.
inline void bind_workspace(Model& m, char* workspace) {
  const Layout at = lay_out(m);
  m.drop_graphs();
  m.workspace = workspace;
  for (size_t i = 0; i < m.table.buffers.size(); ++i) {
    const Buffer& b = m.table.buffers[i];
    const int64_t arena = at.arena[std::strchr(kUnits, b.unit) - kUnits];
    m.buffers[i] = workspace + arena + b.offset * m.max_units(b.unit);
  }
  m.cos = workspace + at.cos;
  m.sin = workspace + at.sin;
  m.drawn = workspace + at.drawn;
  m.zeros = workspace + at.zeros;
  m.minus_ones = workspace + at.minus_ones;
  m.every_row = workspace + at.every_row;
  m.input_region = workspace + at.inputs;
}

}  // namespace slg
