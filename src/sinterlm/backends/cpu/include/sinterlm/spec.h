// What an emitted translation unit says about its model, and what its forward pass is handed.
#pragma once
#include "sinterlm/args.h"
#include "sinterlm/ranks.h"
#include "sinterlm/threads.h"

namespace sl {

// Compile-time facts. Widths ending in p are padded; offsets are bytes, of activations per token.
struct ModelSpec {
  const char* dtype;     // "bf16" or "fp32"
  const char* kv_dtype;  // the same, or "int8"
  int num_layers, H, Hp, Hq, Hkv, D, F, Fp, V, Vp;
  int kv_width, kv_element_bytes;  // of K, or V, of one token and head
  bool qk_norm;
  uint64_t layout_hash;
  int64_t weights_bytes;
  int64_t bytes_per_token, bytes_per_row;  // of the two activation arenas
  int64_t final_x, final_xw, final_ssq;    // buffers the head reads
  int64_t xw_pitch;                        // bytes from row to row of xw
  int64_t final_norm;                      // weight
  int64_t logits, gathered;                // buffers per sampled row
  int num_ops;
  const char* const* op_names;  // [num_ops] fused ops, in order of first use
  int num_ranks = 1;            // that share the model out; shapes are those of one
};

struct OpCounter {
  int64_t calls, ns;
};

// One step as the emitted code sees it. Every worker holds the same.
template <class E>
struct Run {
  const Batch* batch;
  const char* weights;
  char* token_arena;
  char* row_arena;
  int64_t max_tokens, max_rows;  // units of the arenas
  void* const* kv_base;          // [num_layers]
  int64_t page_stride, head_stride;
  int page_tokens;
  const float* cos;  // [max_model_len][D / 2]
  const float* sin;
  const int32_t* windows;  // [num_layers]
  float eps, qk_eps, scale;
  float* parts;  // attention's workspace
  int64_t parts_floats;
  const int32_t* rows;  // [num_rows] token indices whose logits are wanted
  int num_rows;
  Sampler* sampler;     // draws rows while their logits are made, or null
  float head_eps;       // eps, or 0 where rows come in normalised
  OpCounter* counters;  // [num_ops]
  int64_t* clock;       // when the op that runs now began
  Ranks* ranks;         // where the model is one rank's part

  template <class T>
  const T* weight(int64_t offset) const {
    return reinterpret_cast<const T*>(weights + offset);
  }
  template <class T>
  T* buffer(int64_t offset) const {
    return reinterpret_cast<T*>(token_arena + offset * max_tokens);
  }
  template <class T>
  T* row_buffer(int64_t offset) const {
    return reinterpret_cast<T*>(row_arena + offset * max_rows);
  }
  template <class C>
  Pages<C> pages(int layer) const {
    return {static_cast<C*>(kv_base[layer]), page_stride, head_stride, page_tokens};
  }
  // Operand rows of K columns in a buffer whose rows lie Pitch bytes apart.
  template <class F, int K, int64_t Pitch>
  Rows<F> rows_of(int64_t offset) const {
    static_assert(F::row_bytes(K) <= Pitch, "the memory plan has too little room for a row");
    return {buffer<char>(offset), Pitch};
  }
  template <class F, int K, int64_t Pitch>
  Rows<F> gathered(int64_t offset) const {
    static_assert(F::row_bytes(K) <= Pitch, "the memory plan has too little room for a row");
    return {row_buffer<char>(offset), Pitch};
  }
  template <class F, int K, int64_t Pitch>
  Stream<F> stream(int64_t x, int64_t xw, int64_t ssq) const {
    return {buffer<float>(x), rows_of<F, K, Pitch>(xw), buffer<float>(ssq)};
  }

  // Ends op number `op`: everybody waits for everybody, and worker 0 books the time. `calls` is 0
  // for the rest of an op that was booked already.
  void done(Worker& w, int op, int calls = 1) const {
    w.barrier();
    if (w.id != 0) return;
    const int64_t now = now_ns();
    counters[op].calls += calls;
    counters[op].ns += now - *clock;
    *clock = now;
  }
};

}  // namespace sl
