// The C ABI of a library for a GPU: one file for every model and device, with the launch table and
// code objects of one model behind it. No exception crosses.
#include "debug.h"
#include "timing.h"

struct sl_model {
  std::unique_ptr<slg::Model> impl;
};

namespace slg {

// Text as JSON; a path may hold anything.
inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    char code[8];
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20)
      out += c;
    else
      out += (std::snprintf(code, sizeof code, "\\u%04x", c), code);
  }
  return out + '"';
}

inline std::string describe(const Table& t, const Model* m) {
  std::ostringstream out;
  out << "{\"abi_version\": " << SL_ABI_VERSION << ", \"isa\": \"" << t.device
      << "\", \"dtype\": \"bf16\", \"kv_cache_dtype\": \""
      << (t.fact("kv_bytes") == 1 ? "fp8" : "bf16")
      << "\", \"layout_hash\": " << t.facts.at("layout_hash")
      << ", \"weights_bytes\": " << t.facts.at("weights_bytes")
      << ", \"shape\": {\"num_layers\": " << t.fact("layers")
      << ", \"hidden_size\": " << t.fact("hidden") << ", \"num_heads\": " << t.fact("heads")
      << ", \"num_kv_heads\": " << t.fact("kv_heads") << ", \"head_dim\": " << t.fact("head_dim")
      << ", \"vocab_size\": " << t.fact("vocab") << "}, \"probe_bytes\": 0";
  if (m)
    out << ", \"device\": " << quoted(m->driver.device())
        << ", \"driver\": " << quoted(m->driver.version())
        << ", \"workspace_bytes\": " << lay_out(*m).total << ", \"steps\": " << m->steps
        << ", \"graph_launches\": " << m->graph_launches << ", \"num_threads\": 1"
        << ", \"vendor_gemm\": " << quoted(m->vendor.description());
  out << ", \"ops\": []}";
  return out.str();
}

}  // namespace slg

extern "C" {

uint32_t sl_abi_version(void) { return SL_ABI_VERSION; }

const char* sl_last_error(void) { return sl::last_error(); }

int64_t sl_describe(const sl_model* model, char* buf, int64_t cap) {
  int64_t needed = -1;
  sl::guarded([&] {
    slg::Table own;
    if (!model) SL_TRY(slg::read_own_table(&own));
    const std::string text =
        slg::describe(model ? model->impl->table : own, model ? model->impl.get() : nullptr);
    needed = sl::put_text(text, buf, cap);
    return SL_OK;
  });
  return needed;
}

sl_status sl_open(const sl_open_args* args, sl_model** out) {
  return sl::guarded([&] {
    SL_TRY(sl::check_call("sl_open", out != nullptr, args));
    auto model = std::make_unique<sl_model>();
    SL_TRY(slg::open_model(*args, &model->impl));
    *out = model.release();
    return SL_OK;
  });
}

void sl_close(sl_model* model) { delete model; }

sl_status sl_kv_alloc(sl_model* model, const sl_kv_args* args, sl_kv* out) {
  return sl::guarded([&] {
    SL_TRY(sl::check_call("sl_kv_alloc", model && out, args));
    return slg::kv_alloc(*model->impl, *args, out);
  });
}

void sl_kv_free(sl_model* model, sl_kv* kv) {
  if (model && kv) slg::kv_free(*model->impl, kv);
}

sl_status sl_step(sl_model* model, const sl_step_args* args) {
  return sl::guarded([&] {
    SL_TRY(sl::check_call("sl_step", model != nullptr, args));
    return slg::step(*model->impl, *args);
  });
}

sl_status sl_head(sl_model* model, const sl_head_args* args) {
  return sl::guarded([&] {
    SL_TRY(sl::check_call("sl_head", model != nullptr, args));
    return slg::head(*model->impl, *args);
  });
}

sl_status sl_probe(sl_model*, double, double*, double*) {
  return sl::fail(SL_INVALID, "sl_probe: the peaks of a GPU are not measured by this version");
}

sl_status sl_bind(sl_model* model, const sl_bind_args* args) {
  return sl::guarded([&] {
    SL_TRY(sl::check_call("sl_bind", model != nullptr, args));
    return slg::bind(*model->impl, *args);
  });
}

sl_status sl_enqueue(sl_model* model, const sl_enqueue_args* args) {
  return sl::guarded([&] {
    SL_TRY(sl::check_call("sl_enqueue", model != nullptr, args));
    return slg::enqueue(*model->impl, *args);
  });
}

sl_status sl_enqueue_head(sl_model* model, const sl_enqueue_head_args* args) {
  return sl::guarded([&] {
    SL_TRY(sl::check_call("sl_enqueue_head", model != nullptr, args));
    return slg::enqueue_head(*model->impl, *args);
  });
}

sl_status sl_memory(const sl_memory_args* args) {
  return sl::guarded([&] {
    SL_TRY(sl::check_call("sl_memory", true, args));
    return slg::tell_memory(*args);
  });
}

sl_status sl_launch_range(sl_model* model, int32_t first, int32_t last) {
  return sl::guarded([&] {
    if (!model) return sl::fail(SL_INVALID, "sl_launch_range: a required pointer is null");
    return slg::launch_range(*model->impl, first, last);
  });
}

sl_status sl_peek(sl_model* model, const char* name, void* data, int64_t bytes) {
  return sl::guarded([&] {
    if (!model || !name || !data)
      return sl::fail(SL_INVALID, "sl_peek: a required pointer is null");
    return slg::copy_named(*model->impl, name, data, nullptr, bytes);
  });
}

sl_status sl_poke(sl_model* model, const char* name, const void* data, int64_t bytes) {
  return sl::guarded([&] {
    if (!model || !name || !data)
      return sl::fail(SL_INVALID, "sl_poke: a required pointer is null");
    return slg::copy_named(*model->impl, name, nullptr, data, bytes);
  });
}

sl_status sl_time(sl_model* model, const sl_time_args* args) {
  return sl::guarded([&] {
    SL_TRY(sl::check_call("sl_time", model != nullptr, args));
    return slg::time_launch(*model->impl, *args);
  });
}

}  // extern "C"
