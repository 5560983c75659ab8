/* The C ABI between a SinterLM library and whoever runs it. One header, every target.
 *
 * Rules: every struct starts with its size in bytes (a newer caller may pass a longer one; the
 * library reads what it knows and refuses a shorter one); every call returns an sl_status;
 * sl_last_error() holds the message of this thread's last failure. Pointers are borrowed for the
 * duration of the call. Calls on one model are serialised by the caller.
 */
#ifndef SINTERLM_ABI_H
#define SINTERLM_ABI_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SL_ABI_VERSION 2u
#define SL_API __attribute__((visibility("default")))

typedef enum sl_status {
  SL_OK = 0,
  SL_INVALID = 1,   /* an argument is out of range; the message names it */
  SL_MISMATCH = 2,  /* ABI, layout or ISA of library, weights and machine do not agree */
  SL_NO_MEMORY = 3, /* an allocation failed; the message gives the size */
  SL_IO = 4,        /* weights could not be read */
  SL_INTERNAL = 5,  /* our own bug */
  SL_REDUCE = 6     /* sl_reduce failed; the message has what it returned */
} sl_status;

typedef struct sl_model sl_model; /* opaque */

/* How weights get into memory. */
#define SL_OPEN_HUGE_PAGES 1u /* copy into an anonymous huge-page arena; else mmap the file */

/* Tensor parallelism: every rank runs the same steps, and twice a layer a step needs a sum over
 * them. Called by the thread that called sl_step, on its CPU, while the other workers wait: replace
 * data[count] on every rank by the sum of all ranks' data, the same bits on each, and return 0. Any
 * other value ends the step with SL_REDUCE; the cache then holds nothing of use for the step's
 * tokens, and no further sum is asked for. */
typedef int32_t (*sl_reduce)(void* context, float* data, int64_t count);

typedef struct sl_open_args {
  uint32_t size;
  uint32_t abi_version;     /* SL_ABI_VERSION of the caller */
  uint64_t layout_hash;     /* of the packed weights; must equal the compiled one */
  uint32_t flags;           /* SL_OPEN_* */
  int32_t num_threads;      /* workers, the calling thread included; >= 1 */
  const int32_t* cpu_ids;   /* [num_threads] worker i is pinned to cpu_ids[i]; NULL = not pinned */
  const char* weights_path; /* packed weights file; NULL when weights_base is given */
  const void* weights_base; /* caller-owned packed weights, 64-byte aligned; NULL = read the path */
  uint64_t weights_bytes;   /* must equal the compiled size */
  int32_t max_tokens;       /* most tokens in one step */
  int32_t max_seqs;         /* most sequences in one step */
  int32_t max_sample_rows;  /* most rows sampled in one step */
  int32_t max_model_len;    /* most positions; sizes the rope table */
  float rms_eps;
  float qk_eps; /* eps of the per-head norm; ignored when the model has none */
  float attention_scale;
  float rope_attention_factor;
  int32_t num_inv_freq;   /* must equal head_dim / 2 */
  const double* inv_freq; /* [num_inv_freq] */
  int32_t num_windows;    /* must equal num_layers */
  const int32_t* windows; /* [num_windows] sliding window per layer in tokens, 0 = full */
  int32_t num_slots;      /* slots that remember a sequence's last sampled token; may be 0 */
  int32_t rank;           /* of the num_ranks of sl_describe; the weights are this rank's */
  sl_reduce reduce;       /* NULL where num_ranks is 1 */
  void* reduce_context;   /* handed to reduce */
} sl_open_args;

/* KV cache of the library's own. Page p of layer l, KV head h starts at
 *   kv_base[l] + p * page_stride + h * head_stride            (strides in elements)
 * and holds 2 * page_tokens * D elements:
 *   K [page_tokens/16][D/P][16][P] | V [page_tokens/P][D][P]   P = 2 (bf16) or 1 (fp32).
 * Where kv_cache_dtype of sl_describe is int8, elements are bytes, P is 1, and behind the codes of
 * K, and again behind those of V, stand their scales, fp32 [page_tokens]: a number is code * scale.
 * A page of a head is then 2 * page_tokens * (D + 4) elements. */
typedef struct sl_kv_args {
  uint32_t size;
  int32_t num_pages;
  int32_t page_tokens; /* a multiple of 16 */
} sl_kv_args;

typedef struct sl_kv {
  uint32_t size;
  int32_t num_pages;
  int32_t page_tokens;
  int32_t num_layers;
  int64_t page_stride;  /* elements */
  int64_t head_stride;  /* elements */
  void* const* kv_base; /* [num_layers] */
} sl_kv;

/* Sampling of one row. All token arrays are borrowed for the call. Order of operations: logit bias
 * and allowed mask, penalties, temperature, min_p, top_k, top_p, draw. */
typedef struct sl_sampling {
  uint32_t size;
  float temperature;        /* 0 = greedy, as is anything below 1e-5 */
  float top_p;              /* (0, 1] */
  float min_p;              /* [0, 1] */
  int32_t top_k;            /* 0 = all */
  float repetition_penalty; /* 1 = none; over prompt and output, as in vLLM */
  float presence_penalty;   /* over output */
  float frequency_penalty;  /* over output */
  uint64_t seed;            /* the draw depends on (seed, position, token id) alone */
  int32_t position;         /* index of the token being drawn in its sequence */
  int32_t num_logprobs;     /* -1 = none, 0 = the sampled token's, n = also the n best */
  const int32_t* prompt_tokens;
  int32_t num_prompt_tokens;
  const int32_t* output_tokens;
  int32_t num_output_tokens;
  const int32_t* bias_ids; /* a token id may appear once; bias may be -inf */
  const float* bias;
  int32_t num_bias;
  const uint32_t* allowed;    /* bit mask over the vocabulary, ceil(V / 32) words; NULL = all */
  const int32_t* stop_tokens; /* drawing one of these ends a call of several steps */
  int32_t num_stop_tokens;
} sl_sampling;

#define SL_STEP_SAMPLE 1u /* draw a token for every sample row */
#define SL_STEP_LOGITS 2u /* also copy the raw logits of every sample row out */
#define SL_STEP_HIDDEN 4u /* also copy the final-normed hidden state of every token out */

typedef struct sl_step_args {
  uint32_t size;
  uint32_t flags; /* SL_STEP_*; at least one */
  int32_t num_seqs;
  int32_t num_tokens;          /* over all sequences */
  const int32_t* token_ids;    /* [num_tokens]; a sequence's first may be -1 = the last token that
                                  was sampled in its slot */
  const int32_t* positions;    /* [num_tokens] consecutive within a sequence */
  const int32_t* query_start;  /* [num_seqs + 1] */
  const int32_t* context_lens; /* [num_seqs] tokens in the cache after this step */
  const int32_t* page_table;   /* [num_seqs][page_table_stride] page ids */
  int32_t page_table_stride;
  const int32_t* slots; /* [num_seqs] or NULL; where the last sampled token is kept, -1 none */
  const sl_kv* kv;
  int32_t num_sample_rows;
  const int32_t* sample_rows;  /* [num_sample_rows] token indices, ascending */
  const sl_sampling* sampling; /* [num_sample_rows] */
  int32_t max_logprobs;        /* width of the two top_* outputs */
  /* outputs */
  int32_t* out_tokens;     /* [num_sample_rows] */
  float* out_logprobs;     /* [num_sample_rows] log-softmax of the raw logits at the token; NaN
                              where num_logprobs is -1 */
  int32_t* out_ranks;      /* [num_sample_rows] 1 = the most likely; 0 where num_logprobs is -1 */
  int32_t* out_top_ids;    /* [num_sample_rows][max_logprobs], best first, ties by lower id; -1
                              beyond the row's num_logprobs */
  float* out_top_logprobs; /* [num_sample_rows][max_logprobs], NaN beyond */
  float* out_logits;       /* [num_sample_rows][V] with SL_STEP_LOGITS */
  float* out_hidden;       /* [num_tokens][H] with SL_STEP_HIDDEN */
  /* Several decode steps in one call, for flags = SL_STEP_SAMPLE and sequences of one token each,
   * all sampled, without penalties: each step feeds every sequence the token it drew, one position
   * further. Page tables must reach to the last step's context. The call ends early after a step
   * in which a row drew one of its stop_tokens. Outputs of step i follow those of step i - 1. */
  int32_t num_steps;      /* most steps; 1 = an ordinary step */
  int32_t* out_num_steps; /* how many were run; may be NULL when num_steps is 1 */
} sl_step_args;

typedef struct sl_head_args {
  uint32_t size;
  int32_t num_rows;
  const float* hidden; /* [num_rows][H] final-normed hidden states, as SL_STEP_HIDDEN gives them */
  float* out_logits;   /* [num_rows][V] */
} sl_head_args;

SL_API uint32_t sl_abi_version(void);
SL_API const char* sl_last_error(void);
/* JSON: abi_version, isa, dtype, kv_cache_dtype, num_ranks, shape (of one rank), layout_hash,
 * weights_bytes, probe_bytes (the buffer sl_probe takes), and per fused op {name, calls, ns}.
 * Writes at most cap bytes with the final 0 and returns the length needed. model may be NULL (no
 * counters). */
SL_API int64_t sl_describe(const sl_model* model, char* buf, int64_t cap);
SL_API sl_status sl_open(const sl_open_args* args, sl_model** out);
SL_API void sl_close(sl_model* model);
SL_API sl_status sl_kv_alloc(sl_model* model, const sl_kv_args* args, sl_kv* out);
SL_API void sl_kv_free(sl_model* model, sl_kv* kv);
SL_API sl_status sl_step(sl_model* model, const sl_step_args* args);
SL_API sl_status sl_head(sl_model* model, const sl_head_args* args);
/* Peak of the GEMM instruction this library uses, GFLOP/s, and read bandwidth, GB/s, measured over
 * about `seconds` with the model's workers; the denominators of every figure we print. */
SL_API sl_status sl_probe(sl_model* model, double seconds, double* gflops, double* gbytes);

#ifdef __cplusplus
}
#endif
#endif
