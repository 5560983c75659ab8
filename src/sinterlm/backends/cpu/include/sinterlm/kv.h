// sl_kv_alloc and sl_kv_free: KV pages of the library's own, [layer][page][kv head][K | V].
#pragma once
#include "sinterlm/open.h"

namespace sl {

inline sl_status kv_alloc(Model& m, const sl_kv_args& a, sl_kv* out) {
  const ModelSpec& spec = *m.spec;
  if (a.num_pages < 1) return fail(SL_INVALID, "num_pages is %d", a.num_pages);
  if (a.page_tokens < 16 || a.page_tokens > 4096 || a.page_tokens % 16 != 0)
    return fail(SL_INVALID, "page_tokens is %d and must be a multiple of 16 up to 4096",
                a.page_tokens);
  const int64_t head_stride = int64_t{2} * a.page_tokens * spec.kv_width;
  const int64_t page_stride = head_stride * spec.Hkv;
  int64_t layer_bytes, bytes;
  if (__builtin_mul_overflow(page_stride * spec.kv_element_bytes, int64_t{a.num_pages},
                             &layer_bytes) ||
      __builtin_mul_overflow(layer_bytes, int64_t{spec.num_layers}, &bytes))
    return fail(SL_INVALID, "num_pages is %d: too many to address", a.num_pages);
  KvBlock block{m.shared_arena(bytes), std::vector<void*>(spec.num_layers)};
  if (!block.arena)
    return fail(SL_NO_MEMORY, "no memory for %lld bytes of KV pages", (long long)bytes);
  for (int i = 0; i < spec.num_layers; ++i)
    block.bases[i] = static_cast<char*>(block.arena.data()) + layer_bytes * i;
  m.kv_blocks.push_back(std::move(block));
  *out = {sizeof(sl_kv),
          a.num_pages,
          a.page_tokens,
          spec.num_layers,
          page_stride,
          head_stride,
          m.kv_blocks.back().bases.data()};
  return SL_OK;
}

inline void kv_free(Model& m, sl_kv* kv) {
  m.kv_blocks.remove_if([&](const KvBlock& b) { return b.bases.data() == kv->kv_base; });
  kv->kv_base = nullptr;
}

}  // namespace sl
