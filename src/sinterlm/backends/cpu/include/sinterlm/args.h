// What the emitted forward pass hands to each kernel: plain structs of pointers, with shapes.
//
// E is the element type of q and of wide GEMM operands: bf16 (uint16_t in sl::bf16) or float. C is
// that of KV pages: E, or code8. F is the format of a GEMM's operands (formats.h), Next that of the
// GEMM that reads what this op writes.
// T tokens in the step, H hidden, F intermediate, D head size, Hq/Hkv heads, V vocabulary.
// Widths of activations are padded: Hp, Fp, Qp (= round16(Hq * D)); padded lanes hold zeros.
#pragma once
#include <cstdint>

#define SL_INLINE static inline __attribute__((always_inline))
#define SL_MEMBER inline __attribute__((always_inline))

namespace sl {

constexpr int kLanes = 16;  // columns of a vector, at every ISA level

struct bf16 {
  uint16_t bits;
};

// An element of KV pages in codes: number = code * the scale of its token and head.
struct code8 {
  int8_t code;
};
template <class C>
constexpr bool kInCodes = false;
template <>
inline constexpr bool kInCodes<code8> = true;

// Tokens per K/V pair: bf16 dot products eat two k at a time.
template <class E>
constexpr int kPair = sizeof(E) == 2 ? 2 : 1;

// The step, as kernels see it.
struct Batch {
  int num_tokens;
  int num_seqs;
  const int32_t* token_ids;     // [T] resolved, all >= 0
  const int32_t* positions;     // [T]
  const int32_t* query_start;   // [num_seqs + 1]
  const int32_t* context_lens;  // [num_seqs]
  const int32_t* token_seq;     // [T] the sequence each token belongs to
  const int32_t* page_table;    // [num_seqs][page_table_stride]
  int page_table_stride;
};

// One layer's KV pages; strides in elements. A page of one head is
// K [page_tokens/16][D/P][16][P] | V [page_tokens/P][D][P], and where they are codes, each half is
// followed by its scales, fp32 [page_tokens].
template <class C>
struct Pages {
  C* base;
  int64_t page_stride;
  int64_t head_stride;
  int page_tokens;
};

// Elements that K, or V, of one token and head take in a page.
template <class C>
constexpr int kv_width(int D) {
  return D + (kInCodes<C> ? int{sizeof(float)} : 0);
}

// The left operand of a GEMM of format F: [T][K] in some form, a row every `pitch` bytes.
template <class F>
struct Rows {
  char* data;
  int64_t pitch;
  char* row(int64_t t) const { return data + t * pitch; }
};

// The residual stream and the two by-products every producer of it writes for the next norm.
template <class F>
struct Stream {
  float* x;    // [T][Hp]
  Rows<F> xw;  // [T][Hp]      x * norm_weight
  float* ssq;  // [T][Hp / 16] sum of squares of each 16 columns of x
};

template <class F, class Next>
struct EmbedArgs {
  const Batch* batch;
  const typename F::Weight* table;  // rows [V][Hp], or panels when tied or in codes
  bool table_is_panels;
  const float* norm_weight;  // [Hp]
  Stream<Next> out;
  int H, Hp;
};

template <class E, class C, class F>
struct QkvArgs {
  const Batch* batch;
  Rows<F> xw;        // [T][Hp]
  const float* ssq;  // [T][Hp / 16]
  const typename F::Weight*
      weight;           // panels; per kv head: G query heads, k, v; each head padded to 16 columns
  const float* bias;    // vector in packed column order, or null
  const float* q_norm;  // [D] or null
  const float* k_norm;  // [D] or null
  const float* cos;     // [max_model_len][D / 2]
  const float* sin;     // [max_model_len][D / 2]
  E* q;                 // [T][Qp]
  Pages<C> pages;
  float eps, qk_eps;
  int H, Hp, Hq, Hkv, Qp;
};

template <class E, class C, class Next>
struct AttentionArgs {
  const Batch* batch;
  const E* q;    // [T][Qp]
  Rows<Next> y;  // [T][Qp]
  Pages<C> pages;
  float scale;
  int window;  // 0 = full
  int Hq, Hkv, Qp;
  float* parts;          // workspace for chunks that several workers share
  int64_t parts_floats;  // its size; 0 = never share
};

// o_residual and down_residual: out.x = x + a @ W^T + bias.
template <class F, class Next>
struct ResidualArgs {
  const Batch* batch;
  Rows<F> a;                         // [T][K], K padded
  const typename F::Weight* weight;  // panels
  const float* bias;                 // [N] or null
  const float* norm_weight;          // [Hp]
  const float* x;                    // [T][Hp], may equal out.x
  Stream<Next> out;
  int K, Hp;
};

template <class F, class Next>
struct GateUpArgs {
  const Batch* batch;
  Rows<F> xw;                        // [T][Hp]
  const float* ssq;                  // [T][Hp / 16]
  const typename F::Weight* weight;  // panels, interleaved: 64 gate columns, 64 up columns, ...
  const float* bias;                 // in packed column order, or null
  Rows<Next> h;                      // [T][Fp]
  float eps;
  int H, Hp, Fp;  // Fp a multiple of 64
};

class Sampler;

template <class F>
struct LmHeadArgs {
  Rows<F> xw;           // [T][Hp]
  const float* ssq;     // [T][Hp / 16]
  const int32_t* rows;  // [R] token index of each row
  int num_rows;
  const typename F::Weight* weight;  // panels [Vp/64]...
  float* logits;                     // [R][Vp] of rows kept; columns >= V are not to be read
  Rows<F> gathered;                  // [R][Hp] scratch for the rows' operands
  float eps;
  int H, Hp, V, Vp;
  Sampler* sampler;  // draws rows whose logits are not kept, or null
};

}  // namespace sl
