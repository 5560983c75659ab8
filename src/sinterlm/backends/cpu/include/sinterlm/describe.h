// sl_describe: what this library is and what it has done, as JSON.
#pragma once
#include "sinterlm/caches.h"
#include "sinterlm/open.h"

namespace sl {

__attribute__((format(printf, 2, 3))) inline void append(std::string& to, const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  to += text;
}

// Bytes that sl_probe reads per pass: far more than the caches hold.
inline int64_t probe_bytes() { return std::max(int64_t{512} << 20, 8 * l3_bytes()); }

inline std::string describe(const ModelSpec& s, const Model* m) {
  std::string out;
  append(out, "{\"abi_version\": %u, \"isa\": \"%s\", \"dtype\": \"%s\", ", SL_ABI_VERSION,
         SL_ISA_NAME, s.dtype);
  append(out, "\"kv_cache_dtype\": \"%s\", \"num_ranks\": %d, ", s.kv_dtype, s.num_ranks);
  append(out, "\"layout_hash\": %llu, \"weights_bytes\": %lld, ", (unsigned long long)s.layout_hash,
         (long long)s.weights_bytes);
  append(out, "\"activation_bytes_per_token\": %lld, \"activation_bytes_per_row\": %lld, ",
         (long long)s.bytes_per_token, (long long)s.bytes_per_row);
  append(out,
         "\"shape\": {\"num_layers\": %d, \"hidden_size\": %d, \"num_heads\": %d, "
         "\"num_kv_heads\": %d, \"head_dim\": %d, \"intermediate_size\": %d, \"vocab_size\": %d}",
         s.num_layers, s.H, s.Hq, s.Hkv, s.D, s.F, s.V);
  append(out, ", \"probe_bytes\": %lld", (long long)probe_bytes());
  if (m) {
    append(out, ", \"num_threads\": %d, \"numa_nodes\": %d, \"huge_pages\": %s", m->pool->count(),
           m->nodes.count(), m->args.flags & SL_OPEN_HUGE_PAGES ? "true" : "false");
  }
  out += ", \"ops\": [";
  for (int i = 0; i < s.num_ops; ++i) {
    const OpCounter c = m ? m->counters[i] : OpCounter{0, 0};
    append(out, "%s{\"name\": \"%s\", \"calls\": %lld, \"ns\": %lld}", i ? ", " : "", s.op_names[i],
           (long long)c.calls, (long long)c.ns);
  }
  return out + "]}";
}

}  // namespace sl
