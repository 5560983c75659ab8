// sl_open and sl_close: arguments checked, weights brought into memory, rope table and arenas made.
#pragma once
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <cmath>
#include <list>
#include <memory>
#include <string>

#include "sinterlm/attention.h"
#include "sinterlm/cpu_check.h"
#include "sinterlm/error.h"
#include "sinterlm/matmul.h"
#include "sinterlm/numa.h"
#include "sinterlm/open_check.h"
#include "sinterlm/sample.h"
#include "sinterlm/spec.h"

namespace sl {

// Pages from sl_kv_alloc; given back by sl_kv_free or with the model.
struct KvBlock {
  Arena arena;
  std::vector<void*> bases;  // [num_layers]
};

struct Model {
  const ModelSpec* spec = nullptr;
  sl_open_args args{};  // pointers in here are not to be followed after sl_open
  std::unique_ptr<Pool> pool;
  Nodes nodes;  // of the workers
  Arena weights_arena, rope_arena, token_arena, row_arena, parts_arena;
  int64_t parts_floats = 0;
  const char* weights = nullptr;
  std::vector<int32_t> windows;  // [num_layers]
  std::list<KvBlock> kv_blocks;
  std::vector<OpCounter> counters;  // [num_ops]
  Sampler sampler;
  Ranks ranks;

  // The step's arrays, sized by max_*: a step allocates nothing.
  std::vector<int32_t> token_ids;     // [max_tokens] resolved
  std::vector<int32_t> positions;     // [max_tokens]
  std::vector<int32_t> context_lens;  // [max_seqs]
  std::vector<int32_t> token_seq;     // [max_tokens]
  std::vector<int32_t> identity;      // [max_sample_rows] 0, 1, 2, ...
  std::vector<sl_sampling> sampling;  // [max_sample_rows]
  std::vector<int32_t> slots;         // [num_slots] last sampled token, -1 = none yet

  // An arena of `bytes` that all workers read, on all their nodes.
  Arena shared_arena(size_t bytes) const {
    Arena arena = Arena::zeroed(bytes);
    if (arena && nodes.count() > 1) nodes.interleave(arena.data(), bytes);
    return arena;
  }

  const float* cos() const { return static_cast<const float*>(rope_arena.data()); }
  const float* sin() const { return cos() + int64_t(args.max_model_len) * (spec->D / 2); }
};

inline sl_status check_open(const ModelSpec& spec, const sl_open_args& a) {
  SL_TRY(check_abi(a));
  if (const char* missing = missing_feature())
    return fail(SL_MISMATCH, "the library is built for %s and this CPU lacks %s", SL_ISA_NAME,
                missing);
  return check_open_args({spec.layout_hash, spec.weights_bytes, spec.D, spec.num_layers,
                          SL_OPEN_HUGE_PAGES, spec.num_ranks, kMaxRows},
                         a);
}

// A file descriptor, closed at the end.
struct File {
  int fd;
  ~File() {
    if (fd >= 0) close(fd);
  }
};

// Fills `to` from the file, all workers reading. Returns 0, or an errno; EIO where the file ends.
inline int read_parallel(Pool& pool, int fd, char* to, int64_t bytes) {
  constexpr int64_t kPiece = int64_t{8} << 20;
  std::atomic<int> error{0};
  pool.run([&](Worker& w) {
    w.for_each(static_cast<int>((bytes + kPiece - 1) / kPiece), [&](int piece) {
      int64_t at = piece * kPiece;
      const int64_t end = std::min(bytes, at + kPiece);
      while (at < end && error.load(std::memory_order_relaxed) == 0) {
        const ssize_t n = pread(fd, to + at, end - at, at);
        if (n > 0) {
          at += n;
        } else if (n == 0 || errno != EINTR) {
          error.store(n == 0 ? EIO : errno, std::memory_order_relaxed);
        }
      }
    });
  });
  return error.load();
}

inline sl_status load_weights(Model& m, const sl_open_args& a) {
  const int64_t bytes = m.spec->weights_bytes;
  if (a.weights_base) {
    m.weights = static_cast<const char*>(a.weights_base);
    return SL_OK;
  }
  const File file{open(a.weights_path, O_RDONLY | O_CLOEXEC)};
  struct stat info;
  if (file.fd < 0 || fstat(file.fd, &info) != 0)
    return fail(SL_IO, "cannot open weights %s: %s", a.weights_path, strerror(errno));
  if (info.st_size != bytes)
    return fail(SL_IO, "weights %s hold %lld bytes and must hold %lld", a.weights_path,
                (long long)info.st_size, (long long)bytes);
  const bool copy = a.flags & SL_OPEN_HUGE_PAGES;
  m.weights_arena = copy ? m.shared_arena(bytes) : Arena::file(file.fd, bytes);
  if (!m.weights_arena)
    return fail(SL_NO_MEMORY, "no memory for %lld bytes of weights", (long long)bytes);
  m.weights = static_cast<const char*>(m.weights_arena.data());
  if (!copy) {
    madvise(m.weights_arena.data(), bytes, MADV_WILLNEED);  // a wish
    return SL_OK;
  }
  const int error =
      read_parallel(*m.pool, file.fd, static_cast<char*>(m.weights_arena.data()), bytes);
  if (error != 0) return fail(SL_IO, "cannot read weights %s: %s", a.weights_path, strerror(error));
  return SL_OK;
}

// cos and sin of position * inv_freq, times the attention factor. Within 256 positions the angles
// are added by the addition theorem, in double, which spares a libm call per entry.
inline void fill_rope(Model& m, const sl_open_args& a) {
  constexpr int kSpan = 256;
  const int half = m.spec->D / 2, len = a.max_model_len;
  float* cos_table = static_cast<float*>(m.rope_arena.data());
  float* sin_table = cos_table + int64_t(len) * half;
  std::vector<double> near_cos(kSpan * half), near_sin(kSpan * half);
  m.pool->run([&](Worker& w) {
    w.for_each_static(kSpan, [&](int p) {
      for (int i = 0; i < half; ++i) {
        near_cos[p * half + i] = std::cos(p * a.inv_freq[i]);
        near_sin[p * half + i] = std::sin(p * a.inv_freq[i]);
      }
    });
    w.barrier();
    w.for_each((len + kSpan - 1) / kSpan, [&](int span) {
      const int first = span * kSpan, last = std::min(len, first + kSpan);
      for (int i = 0; i < half; ++i) {
        const double c0 = std::cos(first * a.inv_freq[i]), s0 = std::sin(first * a.inv_freq[i]);
        for (int p = first; p < last; ++p) {
          const double c = near_cos[(p - first) * half + i], s = near_sin[(p - first) * half + i];
          const int64_t at = int64_t(p) * half + i;
          cos_table[at] = static_cast<float>((c0 * c - s0 * s) * a.rope_attention_factor);
          sin_table[at] = static_cast<float>((s0 * c + c0 * s) * a.rope_attention_factor);
        }
      }
    });
  });
}

// Attention's workspace: room for every chunk of as many decoding heads as it would share out, but
// no more than 64 MB; beyond that it shares out fewer, with the same result.
inline int64_t parts_floats(const ModelSpec& spec, const sl_open_args& a) {
  const int64_t items = 4 * int64_t{a.num_threads},
                chunks = (a.max_model_len + kChunk - 1) / kChunk;
  return std::min(items * chunks * (spec.Hq / spec.Hkv) * (spec.D + 2), int64_t{16} << 20);
}

inline sl_status make_buffers(Model& m, const sl_open_args& a) {
  const ModelSpec& spec = *m.spec;
  const size_t rope = size_t(2) * a.max_model_len * (spec.D / 2) * sizeof(float);
  const size_t tokens = spec.bytes_per_token * a.max_tokens;
  const size_t rows = spec.bytes_per_row * a.max_sample_rows;
  m.rope_arena = Arena::zeroed(rope);
  m.token_arena = Arena::zeroed(tokens);
  m.row_arena = Arena::zeroed(rows);
  m.parts_floats = parts_floats(spec, a);
  m.parts_arena = Arena::zeroed(m.parts_floats * sizeof(float));
  if (!m.rope_arena || !m.token_arena || !m.row_arena || !m.parts_arena ||
      !m.sampler.reserve(a.num_threads, spec.V, a.max_sample_rows))
    return fail(SL_NO_MEMORY, "no memory for %zu bytes of activations", rope + tokens + rows);
  m.windows.assign(a.windows, a.windows + a.num_windows);
  m.counters.resize(spec.num_ops);
  m.token_ids.resize(a.max_tokens);
  m.positions.resize(a.max_tokens);
  m.context_lens.resize(a.max_seqs);
  m.token_seq.resize(a.max_tokens);
  m.sampling.resize(a.max_sample_rows);
  m.identity.resize(a.max_sample_rows);
  for (int i = 0; i < a.max_sample_rows; ++i) m.identity[i] = i;
  m.slots.assign(a.num_slots, -1);
  return SL_OK;
}

inline sl_status make_pool(Model& m, const sl_open_args& a) {
  m.pool = std::make_unique<Pool>(a.num_threads, a.cpu_ids);
  if (m.pool->ok()) {
    m.nodes = a.cpu_ids ? Nodes::of(*m.pool) : Nodes::allowed();
    return SL_OK;
  }
  if (m.pool->refused_cpu() >= 0)
    return fail(SL_INVALID, "cpu_ids names CPU %d, where this process may not run",
                m.pool->refused_cpu());
  return fail(SL_NO_MEMORY, "cannot start %d worker threads", a.num_threads);
}

inline sl_status open_model(const ModelSpec& spec, const sl_open_args& a,
                            std::unique_ptr<Model>* out) {
  SL_TRY(check_open(spec, a));
  auto m = std::make_unique<Model>();
  m->spec = &spec;
  m->args = a;
  m->ranks = {a.rank, a.reduce, a.reduce_context};
  SL_TRY(make_pool(*m, a));
  SL_TRY(make_buffers(*m, a));
  SL_TRY(load_weights(*m, a));
  fill_rope(*m, a);
  *out = std::move(m);
  return SL_OK;
}

}  // namespace sl
