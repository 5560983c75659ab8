/* What a library for a GPU has beside abi.h: a stream and memory of the caller's, and a step that
 * is only enqueued. Pointers called `device` are the device's; all others are the host's.
 */
#ifndef SINTERLM_ABI_DEVICE_H
#define SINTERLM_ABI_DEVICE_H
#include "abi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* For sl_open. With SL_OPEN_BORROW sl_bind comes before the first step, and weights_base, if given,
 * is a device pointer, aligned to 256 bytes. */
#define SL_OPEN_EAGER 2u  /* launch every kernel of every step: no graphs */
#define SL_OPEN_BORROW 4u /* stream and workspace are the caller's */
#define SL_OPEN_NOISE 8u  /* weights are small finite noise, and weights_path is not read */

typedef struct sl_bind_args {
  uint32_t size;
  void* stream;             /* hipStream_t or CUstream: the workspace is filled there, which waits;
                               sl_step and sl_head run there */
  void* workspace;          /* device, aligned to 256 bytes */
  uint64_t workspace_bytes; /* at least workspace_bytes of sl_describe(model) */
} sl_bind_args;

/* One step whose inputs are on the device already. Nothing is checked but what the host can see. */
typedef struct sl_enqueue_args {
  uint32_t size;
  void* stream; /* all work goes there, behind what another stream has of this model's */
  int32_t num_tokens;
  int32_t num_seqs;
  int32_t num_sample_rows;
  int32_t is_decode;           /* 1: every sequence has one token */
  const int32_t* token_ids;    /* device [num_tokens] */
  const int32_t* positions;    /* device [num_tokens] */
  const int32_t* kv_slots;     /* device [num_tokens] page * page_tokens + place in it */
  const int32_t* page_table;   /* device [num_seqs][page_table_stride] */
  const int32_t* query_start;  /* device [num_seqs + 1] */
  const int32_t* context_lens; /* device [num_seqs] */
  const int32_t* sample_rows;  /* device [num_sample_rows] */
  int32_t page_table_stride;
  int32_t page_tokens;
  int64_t page_stride; /* elements, multiples of 16, as are the next two */
  int32_t token_stride;
  int32_t head_stride;
  void* const* k_base; /* [layers] device */
  void* const* v_base; /* [layers] device */
  float* out_logits;   /* device [num_sample_rows][vocabulary rounded up to 64] */
  int32_t* out_tokens; /* device [num_sample_rows] the most likely ones; NULL = not wanted */
  void* out_hidden;    /* device [num_tokens][hidden_stride] bf16, final-normed hidden states of all
                          tokens; NULL = not wanted */
  int32_t hidden_stride; /* elements, a multiple of 16 */
} sl_enqueue_args;

/* Logits of rows whose hidden states a step gave. */
typedef struct sl_enqueue_head_args {
  uint32_t size;
  void* stream;
  int32_t num_rows;    /* at most max_sample_rows of sl_open */
  const void* hidden;  /* device [num_rows][H] bf16 */
  float* out_logits;   /* device [num_rows][vocabulary rounded up to 64] */
  int32_t* out_tokens; /* device [num_rows] the most likely ones; NULL = not wanted */
} sl_enqueue_head_args;

SL_API sl_status sl_bind(sl_model* model, const sl_bind_args* args);
/* Enqueue a step, or the head alone. Neither waits nor allocates, so the stream may be being
 * captured. Rows of padding: slot -1, and sequences without tokens whose context is 0. */
SL_API sl_status sl_enqueue(sl_model* model, const sl_enqueue_args* args);
SL_API sl_status sl_enqueue_head(sl_model* model, const sl_enqueue_head_args* args);

/* Without a model: the memory of the device that sl_open would take. */
typedef struct sl_memory_args {
  uint32_t size;
  int32_t max_tokens; /* these as sl_open takes them */
  int32_t max_seqs;
  int32_t max_sample_rows;
  int32_t max_model_len;
  int32_t num_slots;
  uint64_t* out_free;      /* bytes that nobody has */
  uint64_t* out_total;     /* bytes of the device */
  uint64_t* out_workspace; /* bytes that such a model takes beside weights and pages */
} sl_memory_args;

SL_API sl_status sl_memory(const sl_memory_args* args);

/* For whoever verifies kernels on a device: steps run the launches [first, last) of the table
 * alone, eagerly, and draw nothing (every token is -1); 0, 0 = steps are whole again. */
SL_API sl_status sl_launch_range(sl_model* model, int32_t first, int32_t last);
/* Copies between `data` and what an argument of the table names: `buffer:NAME`, or `k:LAYER`, which
 * is the layer's pages. The call waits. */
SL_API sl_status sl_peek(sl_model* model, const char* name, void* data, int64_t bytes);
SL_API sl_status sl_poke(sl_model* model, const char* name, const void* data, int64_t bytes);

/* For whoever tunes kernels: one launch of the table, timed by the device's own clock. */
typedef struct sl_time_args {
  uint32_t size;
  int32_t launch;          /* of the table */
  int32_t num_tokens;      /* of the step */
  int32_t num_sample_rows; /* of the step */
  int32_t num_seqs;        /* of the step, each with as many of its tokens */
  int32_t context;         /* keys of each sequence, those of the step among them */
  const sl_kv* kv;         /* pages for num_seqs times context tokens, or for several times as many:
                              a launch that reads pages takes the next ones each time */
  int64_t copy_bytes; /* a multiple of 256: launch i reads its weights at (i % copies) * this */
  int32_t copies;     /* behind where the table has them, so that no cache holds them; >= 1 */
  int32_t launches;   /* of a sample: so many, one behind the other, in one graph */
  int32_t samples;
  float warmup_us; /* samples are run, and not told, for so long: clocks rise; once at least */
  float* out_us;   /* [samples] microseconds of a launch, the sample's time over its launches */
} sl_time_args;

/* Fills every buffer with noise, runs the launch for a step of such sizes, and times it. What the
 * buffers held is lost. Pages of a model that was opened with SL_OPEN_NOISE hold noise. */
SL_API sl_status sl_time(sl_model* model, const sl_time_args* args);

#ifdef __cplusplus
}
#endif
#endif
