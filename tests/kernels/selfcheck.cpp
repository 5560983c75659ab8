// Runs every kernel on inputs from a fixed generator and writes the raw outputs to stdout: built
// for two machines at the generic level, the two outputs must be the same bytes.
#include <cstdio>
#include <vector>

#include "optest.cpp"

namespace {

struct Lcg {
  uint64_t state = 88172645463325252ull;
  float next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<float>(static_cast<int32_t>(state >> 40) - (1 << 23)) * 0x1p-23f;
  }
};

template <class E>
std::vector<E> random_elems(size_t n, Lcg& g) {
  std::vector<E> v(n);
  for (auto& x : v) x = from_float<E>(g.next());
  return v;
}

template <class T>
void emit(const std::vector<T>& v) {
  fwrite(v.data(), sizeof(T), v.size(), stdout);
}

template <class E>
void check_gemm(int is_bf16, int T, int K, int N, Lcg& g) {
  const auto a = random_elems<E>(size_t(T) * K, g);
  const auto w = random_elems<E>(size_t(round_up(2 * N, 64)) * std::max(K, N), g);
  const auto bias = random_elems<float>(2 * N, g), norm = random_elems<float>(N, g);
  const auto x = random_elems<float>(size_t(T) * N, g);
  std::vector<float> out(size_t(T) * N), ssq(size_t(T) * N / 16), logits(size_t(T) * 2 * N);
  std::vector<E> xw(size_t(T) * N), h(size_t(T) * N), gathered(size_t(T) * N);
  ot_residual(is_bf16, 3, T, K, N, a.data(), w.data(), bias.data(), norm.data(), x.data(),
              out.data(), xw.data(), ssq.data());
  emit(out), emit(xw), emit(ssq);
  ot_gate_up(is_bf16, 2, T, N, N, N, xw.data(), ssq.data(), w.data(), bias.data(), 1e-5f, h.data());
  emit(h);
  std::vector<int32_t> rows(T);
  for (int i = 0; i < T; ++i) rows[i] = i;
  ot_lm_head(is_bf16, 2, T, N, N, 2 * N, 2 * N, xw.data(), ssq.data(), rows.data(), w.data(), 1e-5f,
             logits.data(), gathered.data());
  emit(logits);
}

template <class E>
void check_attention(int is_bf16, int len, int queries, int window, Lcg& g) {
  constexpr int Hq = 6, Hkv = 2, D = 64, H = 64, page = 32, heads = Hq + 2 * Hkv;
  const int pages = round_up(len, page) / page;
  constexpr int head = 2 * page * kv_width<Cache<E>>(D);
  std::vector<Cache<E>> kv(size_t(pages) * Hkv * head);
  std::vector<int32_t> table(pages), ids(len), pos(len), seq(len);
  for (int i = 0; i < pages; ++i) table[i] = pages - 1 - i;
  for (int i = 0; i < len; ++i) pos[i] = i;
  const auto cos = random_elems<float>(size_t(len) * D / 2, g);
  const auto sin = random_elems<float>(size_t(len) * D / 2, g);
  const auto w = random_elems<E>(size_t(heads) * D * H, g);
  const auto xw = random_elems<E>(size_t(len) * H, g);
  const std::vector<float> ssq(size_t(len) * H / 16, 4.0f);
  const auto bias = random_elems<float>(heads * D, g), norm = random_elems<float>(D, g);
  for (int done = 0; done < len;) {  // a first chunk, then the queries one step at a time
    const int n = done == 0 ? len - queries : 1;
    const int32_t start[2] = {0, n}, context = done + n;
    const Step s{
        n,     1,    ids.data(), pos.data() + done, start, &context, seq.data(), table.data(),
        pages, page, kv.data(),  Hkv * head,        head};
    std::vector<E> q(size_t(n) * Hq * D), y(q.size());
    ot_qkv(is_bf16, 2, &s, H, H, Hq, Hkv, D, xw.data() + size_t(done) * H, ssq.data(), w.data(),
           bias.data(), norm.data(), norm.data(), cos.data(), sin.data(), 1e-5f, 1e-6f, q.data());
    ot_attention(is_bf16, 2, &s, Hq, Hkv, D, 0.125f, window, q.data(), y.data(), 1 << 16);
    emit(q), emit(y);
    done += n;
  }
  emit(kv);
}

}  // namespace

int main() {
  Lcg g;
  for (int T : {1, 2, 7}) {
    check_gemm<bf16>(1, T, 1056, 64, g);
    check_gemm<float>(0, T, 144, 128, g);
  }
  for (int window : {0, 40}) {
    check_attention<bf16>(1, 290, 5, window, g);
    check_attention<float>(0, 37, 3, window, g);
  }
  return 0;
}
