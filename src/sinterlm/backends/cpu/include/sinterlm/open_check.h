// What can be wrong with the arguments of sl_open, on any target.
#pragma once
#include <cmath>

#include "sinterlm/error.h"

namespace sl {

// What a library was compiled for.
struct Compiled {
  uint64_t layout_hash;
  int64_t weights_bytes;
  int D, num_layers;
  uint32_t flags;            // SL_OPEN_* that it knows
  int num_ranks = 1;         // that share the model out
  int max_tokens = 1 << 20;  // of a step, at most
};

inline sl_status check_abi(const sl_open_args& a) {
  if (a.abi_version == SL_ABI_VERSION) return SL_OK;
  return fail(SL_MISMATCH, "the caller speaks ABI version %u and the library %u", a.abi_version,
              SL_ABI_VERSION);
}

inline sl_status check_open_args(const Compiled& spec, const sl_open_args& a) {
  if (a.layout_hash != spec.layout_hash)
    return fail(SL_MISMATCH, "layout_hash is %016llx and the library was compiled for %016llx",
                (unsigned long long)a.layout_hash, (unsigned long long)spec.layout_hash);
  if (a.weights_bytes != static_cast<uint64_t>(spec.weights_bytes))
    return fail(SL_MISMATCH, "weights_bytes is %llu and the library was compiled for %lld",
                (unsigned long long)a.weights_bytes, (long long)spec.weights_bytes);
  const struct {
    const char* name;
    int32_t value, low, high;
  } ranges[] = {
      {"num_threads", a.num_threads, 1, 1024},
      {"max_tokens", a.max_tokens, 1, spec.max_tokens},
      {"max_seqs", a.max_seqs, 1, a.max_tokens},
      {"max_sample_rows", a.max_sample_rows, 1, a.max_tokens},
      {"max_model_len", a.max_model_len, 1, 1 << 24},
      {"num_inv_freq", a.num_inv_freq, spec.D / 2, spec.D / 2},
      {"num_windows", a.num_windows, spec.num_layers, spec.num_layers},
      {"num_slots", a.num_slots, 0, 1 << 24},
      {"rank", a.rank, 0, spec.num_ranks - 1},
  };
  for (const auto& r : ranges)
    if (r.value < r.low || r.value > r.high)
      return fail(SL_INVALID, "%s is %d and must be in [%d, %d]", r.name, r.value, r.low, r.high);
  const struct {
    const char* name;
    float value;
    bool ok;
  } numbers[] = {
      {"rms_eps", a.rms_eps, a.rms_eps >= 0},
      {"qk_eps", a.qk_eps, a.qk_eps >= 0},
      {"attention_scale", a.attention_scale, true},
      {"rope_attention_factor", a.rope_attention_factor, true},
  };
  for (const auto& n : numbers)
    if (!n.ok || !std::isfinite(n.value))
      return fail(SL_INVALID, "%s is %g", n.name, double{n.value});
  if (a.flags & ~spec.flags) return fail(SL_INVALID, "flags is %u", a.flags);
  if (!a.inv_freq) return fail(SL_INVALID, "inv_freq is null");
  for (int i = 0; i < a.num_inv_freq; ++i)
    if (!std::isfinite(a.inv_freq[i]))
      return fail(SL_INVALID, "inv_freq[%d] is %g", i, a.inv_freq[i]);
  if (!a.windows) return fail(SL_INVALID, "windows is null");
  for (int i = 0; i < a.num_windows; ++i)
    if (a.windows[i] < 0) return fail(SL_INVALID, "windows[%d] is %d", i, a.windows[i]);
  if (!a.weights_path == !a.weights_base)
    return fail(SL_INVALID, "give one of weights_path and weights_base");
  if (reinterpret_cast<uintptr_t>(a.weights_base) % 64 != 0)
    return fail(SL_INVALID, "weights_base is not aligned to 64 bytes");
  if (spec.num_ranks > 1 && !a.reduce)
    return fail(SL_INVALID,
                "reduce is null and the model is one of %d ranks: only a host that sums over them "
                "can run it",
                spec.num_ranks);
  if (spec.num_ranks == 1 && a.reduce)
    return fail(SL_INVALID, "reduce is given and the model is whole: there is nothing to sum");
  return SL_OK;
}

}  // namespace sl
