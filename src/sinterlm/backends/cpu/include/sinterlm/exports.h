// The C ABI over `sl::Net`, the model that the emitted translation unit defined before including
// this. No exception crosses: allocation failures and our own bugs become statuses.
#include "sinterlm/calls.h"
#include "sinterlm/model.h"

struct sl_model {
  std::unique_ptr<sl::Model> impl;
};

namespace sl {

static_assert(sizeof(AttentionScratch<Net::Cache, Net::spec.D>) <= kScratchBytes,
              "attention's working set must fit a worker's scratch");
static_assert(Net::spec.Hq / Net::spec.Hkv <= kAttentionRows,
              "one token's heads of a group must fit attention's working set");

}  // namespace sl

extern "C" {

uint32_t sl_abi_version(void) { return SL_ABI_VERSION; }

const char* sl_last_error(void) { return sl::last_error(); }

int64_t sl_describe(const sl_model* model, char* buf, int64_t cap) {
  int64_t needed = -1;
  sl::guarded([&] {
    const std::string text = sl::describe(sl::Net::spec, model ? model->impl.get() : nullptr);
    needed = sl::put_text(text, buf, cap);
    return SL_OK;
  });
  return needed;
}

sl_status sl_open(const sl_open_args* args, sl_model** out) {
  return sl::guarded([&] {
    SL_TRY(sl::check_call("sl_open", out != nullptr, args));
    auto model = std::make_unique<sl_model>();
    SL_TRY(sl::open_model(sl::Net::spec, *args, &model->impl));
    *out = model.release();
    return SL_OK;
  });
}

void sl_close(sl_model* model) { delete model; }

sl_status sl_kv_alloc(sl_model* model, const sl_kv_args* args, sl_kv* out) {
  return sl::guarded([&] {
    SL_TRY(sl::check_call("sl_kv_alloc", model && out, args));
    return sl::kv_alloc(*model->impl, *args, out);
  });
}

void sl_kv_free(sl_model* model, sl_kv* kv) {
  if (model && kv) sl::kv_free(*model->impl, kv);
}

sl_status sl_step(sl_model* model, const sl_step_args* args) {
  return sl::guarded([&] {
    SL_TRY(sl::check_call("sl_step", model != nullptr, args));
    return sl::step<sl::Net>(*model->impl, *args);
  });
}

sl_status sl_head(sl_model* model, const sl_head_args* args) {
  return sl::guarded([&] {
    SL_TRY(sl::check_call("sl_head", model != nullptr, args));
    return sl::head<sl::Net>(*model->impl, *args);
  });
}

sl_status sl_probe(sl_model* model, double seconds, double* gflops, double* gbytes) {
  return sl::guarded([&] {
    if (!model) return sl::fail(SL_INVALID, "sl_probe: a required pointer is null");
    return sl::probe<sl::Net::Main>(*model->impl, seconds, gflops, gbytes);
  });
}

}  // extern "C"
