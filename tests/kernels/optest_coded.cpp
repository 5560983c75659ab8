// The op-test library of quantised GEMMs: every kernel behind a C function, for a list of formats.
// Activations come in as fp32 and are stored by the format itself.
#include <vector>

#include "sinterlm/attention.h"
#include "sinterlm/head.h"
#include "sinterlm/mlp.h"
#include "sinterlm/norm.h"

using namespace sl;

namespace {

template <class Fn>
void on_workers(int threads, Fn fn) {
  Pool pool(threads, nullptr);
  pool.run(fn);
}

// Formats that are built: all, or the one numbered ONLY_FORMAT.
#ifdef ONLY_FORMAT
template <int Number>
constexpr bool kBuilt = Number == ONLY_FORMAT;
#else
template <int Number>
constexpr bool kBuilt = true;
#endif

// fn(F{}) for format number `format`; FORMATS of coded.py has the same order.
template <class Fn>
int with_format(int format, Fn fn) {
  int status = 1;
  const auto offer = [&](auto number, auto f) {
    if constexpr (kBuilt<decltype(number)::value>)
      if (format == number) status = fn(f);
  };
  offer(std::integral_constant<int, 0>(), Coded<8, 0, false, 64>());
  offer(std::integral_constant<int, 1>(), Coded<8, 32, false, 16>());
  offer(std::integral_constant<int, 2>(), Coded<4, 32, false, 64>());
  offer(std::integral_constant<int, 3>(), Coded<4, 128, true, 32>());
  offer(std::integral_constant<int, 4>(), Coded<8, 0, true, 64>());
  offer(std::integral_constant<int, 5>(), WeightOnly<bf16, 4, 64, true>());
  offer(std::integral_constant<int, 6>(), WeightOnly<float, 8, 0, false>());
  offer(std::integral_constant<int, 7>(), WeightOnly<bf16, 8, 32, false>());
  return status;
}

template <class F>
constexpr bool kIsCoded = false;
template <int B, int G, bool O, int A>
constexpr bool kIsCoded<Coded<B, G, O, A>> = true;

// Rows of a format, with room for every row's bytes and NaN in all of it.
template <class F>
struct OwnRows {
  std::vector<char> data;
  int K;
  OwnRows(int rows, int K) : data(rows * F::row_bytes(K), '\xff'), K(K) {}
  Rows<F> get() { return {data.data(), F::row_bytes(K)}; }
  void fill(const float* v) {
    const int rows = static_cast<int>(data.size() / F::row_bytes(K));
    for (int r = 0; r < rows; ++r)
      for (int n = 0; n < K; n += F::kUnit) F::store(get().row(r), K, n, v + int64_t(r) * K + n);
  }
};

// What a row stands for, in fp32; of codes also the codes, scales and sums themselves.
template <class E>
void read_rows(Wide<E>, const Rows<Wide<E>>& rows, int T, int K, float* out) {
  for (int t = 0; t < T; ++t)
    for (int k = 0; k < K; ++k)
      out[int64_t(t) * K + k] = to_float(reinterpret_cast<const E*>(rows.row(t))[k]);
}
template <class E, int B, int G, bool O>
void read_rows(WeightOnly<E, B, G, O>, const Rows<WeightOnly<E, B, G, O>>& rows, int T, int K,
               float* out) {
  read_rows(Wide<E>{}, {rows.data, rows.pitch}, T, K, out);
}
template <int B, int G, bool O, int A>
void read_rows(Coded<B, G, O, A>, const Rows<Coded<B, G, O, A>>& rows, int T, int K, float* out) {
  using F = Coded<B, G, O, A>;
  constexpr bool is_wide = sizeof(typename F::Act) == 2;  // then a quad lies as 0 2 1 3
  for (int t = 0; t < T; ++t) {
    const auto* codes = reinterpret_cast<const typename F::Act*>(rows.row(t));
    const auto* scales = reinterpret_cast<const float*>(rows.row(t) + F::scales_at(K));
    for (int k = 0; k < K; ++k) {
      const int in = k % 4, at = is_wide && (in == 1 || in == 2) ? k + 3 - 2 * in : k;
      out[int64_t(t) * K + k] = static_cast<float>(codes[at]) * scales[k / A];
    }
  }
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// Codes [T][K], scales and sums of rows in a format of int8 activations.
API int oc_store(int format, int T, int K, const float* v, int32_t* codes, float* scales,
                 int32_t* sums) {
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    if constexpr (kIsCoded<F>) {
      OwnRows<F> rows(T, K);
      rows.fill(v);
      constexpr bool is_wide = sizeof(typename F::Act) == 2;
      for (int t = 0; t < T; ++t) {
        const char* row = rows.get().row(t);
        for (int k = 0; k < K; ++k) {
          const int in = k % 4, at = is_wide && (in == 1 || in == 2) ? k + 3 - 2 * in : k;
          codes[int64_t(t) * K + k] = reinterpret_cast<const typename F::Act*>(row)[at];
        }
        std::memcpy(scales + t * (K / F::kUnit), row + F::scales_at(K), K / F::kUnit * 4);
        std::memcpy(sums + t * (K / F::kBlock), row + F::sums_at(K), K / F::kBlock * 4);
      }
      return 0;
    } else {
      return 1;
    }
  });
}

API int oc_residual(int format, int threads, int T, int K, int Hp, const float* a, const uint8_t* w,
                    const float* bias, const float* norm, const float* x, float* out_x, float* xw,
                    float* ssq) {
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    OwnRows<F> in(T, K), out(T, Hp);
    in.fill(a);
    Batch b{};
    b.num_tokens = T;
    const ResidualArgs<F, F> p{&b, in.get(), w, bias, norm, x, {out_x, out.get(), ssq}, K, Hp};
    on_workers(threads, [&](Worker& wk) { residual_matmul(wk, p); });
    read_rows(F{}, out.get(), T, Hp, xw);
    return 0;
  });
}

API int oc_gate_up(int format, int threads, int T, int H, int Hp, int Fp, const float* xw,
                   const float* ssq, const uint8_t* w, const float* bias, float eps, float* h) {
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    OwnRows<F> in(T, Hp), out(T, Fp);
    in.fill(xw);
    Batch b{};
    b.num_tokens = T;
    const GateUpArgs<F, F> p{&b, in.get(), ssq, w, bias, out.get(), eps, H, Hp, Fp};
    on_workers(threads, [&](Worker& wk) { norm_gate_up_act(wk, p); });
    read_rows(F{}, out.get(), T, Fp, h);
    return 0;
  });
}

API int oc_lm_head(int format, int threads, int T, int R, int H, int Hp, int V, int Vp,
                   const float* xw, const float* ssq, const int32_t* rows, const uint8_t* w,
                   float eps, float* logits) {
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    OwnRows<F> in(T, Hp), gathered(R, Hp);
    in.fill(xw);
    const LmHeadArgs<F> p{in.get(), ssq, rows, R, w,  logits, gathered.get(),
                          eps,      H,   Hp,   V, Vp, nullptr};
    on_workers(threads, [&](Worker& wk) {
      gather_rows(wk, p);
      wk.barrier();
      lm_head(wk, p);
    });
    return 0;
  });
}

API int oc_embed(int format, int threads, int T, const int32_t* ids, int H, int Hp,
                 const uint8_t* table, const float* norm, float* x, float* xw, float* ssq) {
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    OwnRows<F> out(T, Hp);
    Batch b{};
    b.num_tokens = T;
    b.token_ids = ids;
    const EmbedArgs<F, F> p{&b, table, true, norm, {x, out.get(), ssq}, H, Hp};
    on_workers(threads, [&](Worker& wk) { embed_norm(wk, p); });
    read_rows(F{}, out.get(), T, Hp, xw);
    return 0;
  });
}

API const char* oc_isa() { return SL_ISA_NAME; }
