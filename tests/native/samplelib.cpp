// The sampler over given logits, for its tests.
#include "sinterlm/sample.h"

#define API extern "C" __attribute__((visibility("default")))

using namespace sl;

// First row that is not finite, or -1, in *bad; first row without a token, or -1, in *none. With
// `early`, rows that may be are drawn by see().
API int st_sample(int threads, const float* logits, int64_t stride, int V, const sl_sampling* rows,
                  int num_rows, int max_logprobs, int32_t* tokens, float* logprobs, int32_t* ranks,
                  int32_t* top_ids, float* top_logprobs, int32_t* bad, int32_t* none, int repeat,
                  int early) {
  Pool pool(threads, nullptr);
  Sampler sampler;
  if (!pool.ok() || !sampler.reserve(threads, V, num_rows)) return 1;
  for (int i = 0; i < repeat; ++i) {
    sampler.begin({rows, num_rows, logits, stride, V, max_logprobs, tokens, logprobs, ranks,
                   top_ids, top_logprobs, early != 0});
    const int spans = (V + kSpan - 1) / kSpan;
    pool.run([&](Worker& w) {
      w.for_each(num_rows * spans, [&](int item) {
        const int row = item / spans, first = item % spans * kSpan;
        if (sampler.is_early(row)) sampler.see(w.id, row, first, logits + row * stride + first);
      });
      w.barrier();
      sampler.scan(w);
      w.barrier();
      sampler.draw(w);
    });
  }
  *bad = sampler.first_not_finite();
  *none = sampler.first_without_token();
  return 0;
}

API void st_exp(const float* x, float* y, int n) { exp_shifted(x, n, 0.0f, y); }

API void st_log(const float* x, float* y, int n) {
  for (int i = 0; i < n; i += vm::W) vm::store(y + i, vm::log(vm::load(x + i)));
}

API void st_log_double(const double* x, double* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = log_double(x[i]);
}

API double st_sum_exp(const float* x, int n, float shift) { return sum_exp(x, n, shift); }

// Noise of ids 0, 1, ...; n a multiple of 8.
API void st_gumbel(uint64_t seed, int32_t position, float* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = 0;
  GumbelNoise(seed, position).add_to(y, n, [](int i) { return i; });
}
