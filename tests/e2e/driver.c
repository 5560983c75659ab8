/* Runs one prompt through a library by the C ABI alone and writes its logits to stdout, raw.
 * job.h, written by test_isa_levels.py, holds the manifest's numbers and the prompt. */
#include <stdio.h>
#include <stdlib.h>

#include "abi.h"
#include "job.h"

#define PAGE 16
#define N ((int32_t)(sizeof prompt / sizeof *prompt))

static void check(sl_status status, const char* call) {
  if (status == SL_OK) return;
  fprintf(stderr, "%s: %s\n", call, sl_last_error());
  exit(1);
}

int main(void) {
  sl_open_args open = {0};
  open.size = sizeof open;
  open.abi_version = SL_ABI_VERSION;
  open.layout_hash = JOB_LAYOUT_HASH;
  open.num_threads = 2;
  open.weights_path = JOB_WEIGHTS;
  open.weights_bytes = JOB_WEIGHTS_BYTES;
  open.max_tokens = open.max_sample_rows = N;
  open.max_seqs = 1;
  open.max_model_len = 256;
  open.rms_eps = JOB_RMS_EPS;
  open.qk_eps = JOB_QK_EPS;
  open.attention_scale = JOB_ATTENTION_SCALE;
  open.rope_attention_factor = JOB_ROPE_FACTOR;
  open.inv_freq = inv_freq;
  open.num_inv_freq = sizeof inv_freq / sizeof *inv_freq;
  open.windows = windows;
  open.num_windows = sizeof windows / sizeof *windows;
  sl_model* model = 0;
  check(sl_open(&open, &model), "sl_open");

  sl_kv_args want = {sizeof want, (N + PAGE - 1) / PAGE, PAGE};
  sl_kv kv = {sizeof kv};
  check(sl_kv_alloc(model, &want, &kv), "sl_kv_alloc");

  int32_t positions[N], pages[(N + PAGE - 1) / PAGE], start[2] = {0, N}, context = N;
  for (int32_t i = 0; i < N; ++i) positions[i] = i;
  for (int32_t i = 0; i < want.num_pages; ++i) pages[i] = want.num_pages - 1 - i;
  float* logits = malloc(sizeof(float) * N * JOB_VOCAB);
  sl_step_args step = {0};
  step.size = sizeof step;
  step.flags = SL_STEP_LOGITS;
  step.num_seqs = 1;
  step.num_tokens = step.num_sample_rows = N;
  step.token_ids = prompt;
  step.positions = step.sample_rows = positions;
  step.query_start = start;
  step.context_lens = &context;
  step.page_table = pages;
  step.page_table_stride = want.num_pages;
  step.kv = &kv;
  step.num_steps = 1;
  step.out_logits = logits;
  check(sl_step(model, &step), "sl_step");
  fwrite(logits, sizeof(float), (size_t)N * JOB_VOCAB, stdout);
  sl_kv_free(model, &kv);
  sl_close(model);
  return 0;
}
