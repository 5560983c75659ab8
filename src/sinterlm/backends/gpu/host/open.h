// sl_open, sl_kv_alloc and their opposites: arguments checked, code objects loaded, weights, rope
// table and workspace brought to the device.
#pragma once
#include "abi_device.h"
#include "launch.h"
#include "sinterlm/open_check.h"
#include "sinterlm/step_check.h"

namespace slg {

constexpr uint32_t kOpenFlags = SL_OPEN_HUGE_PAGES | SL_OPEN_EAGER | SL_OPEN_BORROW | SL_OPEN_NOISE;

inline sl_status check_open(const Model& m, const sl_open_args& a) {
  SL_TRY(sl::check_abi(a));
  const Table& t = m.table;
  SL_TRY(sl::check_open_args({t.facts.at("layout_hash"), int64_t(t.facts.at("weights_bytes")),
                              m.shape.D, m.shape.num_layers, kOpenFlags},
                             a));
  if (a.max_seqs > t.fact("max_seqs"))
    return fail(SL_INVALID, "max_seqs is %d and the kernels of %s take at most %d", a.max_seqs,
                t.device.c_str(), t.fact("max_seqs"));
  return SL_OK;
}

inline sl_status load_kernels(Model& m) {
  m.modules.resize(m.table.kernels.size());
  m.functions.resize(m.table.kernels.size());
  for (size_t i = 0; i < m.table.kernels.size(); ++i) {
    const Kernel& k = m.table.kernels[i];
    if (k.is_vendor()) continue;
    const int code = m.driver.module_load(&m.modules[i], k.code);
    if (code == kNoBinaryForGpu || code == kInvalidImage)
      return fail(SL_MISMATCH,
                  "the device is %s, and the bundle was compiled for %s; compile it "
                  "with another --target",
                  m.driver.device().c_str(), m.table.device.c_str());
    SL_TRY(m.driver.check(code, "loading a code object"));
    SL_TRY(m.driver.check(m.driver.function(&m.functions[i], m.modules[i], k.symbol.c_str()),
                          k.symbol.c_str()));
    if (!m.driver.is_hip() && k.shared > kDefaultShared)
      SL_TRY(m.driver.check(m.driver.set_attribute(m.functions[i], kMaxDynamicShared, k.shared),
                            "asking for shared memory"));
  }
  return SL_OK;
}

// A file's bytes to the device through pinned memory, piece by piece.
inline sl_status upload_file(Model& m, const char* path, int64_t bytes, char* to) {
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  struct stat info;
  if (fd < 0 || fstat(fd, &info) != 0 || info.st_size != bytes) {
    const int error = errno;
    const bool wrong_size = fd >= 0 && info.st_size != bytes;
    if (fd >= 0) ::close(fd);
    return wrong_size ? fail(SL_IO, "weights %s hold %lld bytes and must hold %lld", path,
                             (long long)info.st_size, (long long)bytes)
                      : fail(SL_IO, "cannot open weights %s: %s", path, strerror(error));
  }
  constexpr int64_t kPiece = int64_t{64} << 20;
  Memory piece;
  sl_status status = piece.allocate_host(m.driver, std::min(bytes, kPiece));
  for (int64_t at = 0; status == SL_OK && at < bytes;) {
    const ssize_t n = pread(fd, piece.data(), std::min(kPiece, bytes - at), at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      status = fail(SL_IO, "cannot read weights %s: %s", path, n ? strerror(errno) : "it ends");
      break;
    }
    status =
        m.driver.check(m.driver.to_device(to + at, piece.data(), n, m.stream), "copying weights");
    if (status == SL_OK) status = m.driver.check(m.driver.stream_wait(m.stream), "copying weights");
    at += n;
  }
  ::close(fd);
  return status;
}

// Numbers that are finite in every type that kernels read, and as uneven as weights are: zeros
// would flatter a device whose clock depends on how many bits change. Of each 16 bits some are
// drawn: of a bf16 the sign, the lowest bit of the exponent and five of the mantissa, so that no
// byte is an fp8 without a value; the others say how large it is. Waits.
enum class Noise : uint16_t {
  kWeights = 0x3C20,  // around 0.02, bytes as fp8 around 1
  kUnit = 0x3F20,     // around 1, bytes as fp8 too: scores of such queries and keys are uneven
};
inline sl_status fill_noise(Model& m, char* to, int64_t bytes, Noise size = Noise::kWeights,
                            bool is_positive = false) {
  constexpr int64_t kPiece = int64_t{16} << 20;
  constexpr uint64_t kEach = 0x0001000100010001;
  const uint64_t drawn = (is_positive ? 0x009F : 0x809F) * kEach;
  const uint64_t fixed = static_cast<uint16_t>(size) * kEach;
  Memory piece;
  SL_TRY(piece.allocate_host(m.driver, std::min(bytes, kPiece) + 8));
  uint64_t state = 1;
  for (int64_t at = 0; at < std::min(bytes, kPiece); at += 8) {
    state ^= state << 13;  // Marsaglia's xorshift
    state ^= state >> 7;
    state ^= state << 17;
    const uint64_t word = (state & drawn) | fixed;
    std::memcpy(piece.data() + at, &word, 8);
  }
  for (int64_t at = 0; at < bytes; at += kPiece)
    SL_TRY(m.driver.check(
        m.driver.to_device(to + at, piece.data(), std::min(kPiece, bytes - at), m.stream),
        "copying noise"));
  return m.driver.check(m.driver.stream_wait(m.stream), "copying noise");
}

inline sl_status load_weights(Model& m, const sl_open_args& a) {
  if (a.weights_base) {
    if (!(a.flags & SL_OPEN_BORROW) || reinterpret_cast<uintptr_t>(a.weights_base) % kAlign != 0)
      return fail(SL_INVALID,
                  "weights_base must be a device pointer, aligned to %d bytes, and "
                  "flags have SL_OPEN_BORROW",
                  int(kAlign));
    m.weights = static_cast<const char*>(a.weights_base);
    return SL_OK;
  }
  SL_TRY(m.own_weights.allocate(m.driver, a.weights_bytes, "weights"));
  m.weights = m.own_weights.data();
  if (a.flags & SL_OPEN_NOISE) return fill_noise(m, m.own_weights.data(), a.weights_bytes);
  return upload_file(m, a.weights_path, a.weights_bytes, m.own_weights.data());
}

// cos and sin of position * inv_freq, times the attention factor, [positions][D / 2] each.
inline void make_rope(const Model& m, std::vector<float>* cos, std::vector<float>* sin) {
  const sl_open_args& a = m.args;
  for (int p = 0; p < a.max_model_len; ++p)
    for (int i = 0; i < a.num_inv_freq; ++i) {
      cos->push_back(static_cast<float>(std::cos(p * a.inv_freq[i]) * a.rope_attention_factor));
      sin->push_back(static_cast<float>(std::sin(p * a.inv_freq[i]) * a.rope_attention_factor));
    }
}

// What kernels find in a fresh workspace: counters and constants. Waits.
inline sl_status fill_workspace(Model& m, const std::vector<float>& cos,
                                const std::vector<float>& sin) {
  const Driver& d = m.driver;
  const int64_t most = std::max(m.args.max_tokens, m.args.max_sample_rows);
  for (size_t i = 0; i < m.table.buffers.size(); ++i) {
    const Buffer& b = m.table.buffers[i];
    if (b.name != "counters" && b.name != "attention_counters") continue;
    SL_TRY(d.check(d.fill(m.buffers[i], 0, b.bytes * m.max_units(b.unit), m.stream), "counters"));
  }
  SL_TRY(d.check(d.fill(m.zeros, 0, 8 * most, m.stream), "zeros"));
  SL_TRY(d.check(d.fill(m.minus_ones, 0xFF, 4 * most, m.stream), "constants"));
  SL_TRY(d.check(d.fill(m.drawn, 0xFF, int64_t{4} * std::max(1, m.args.num_slots), m.stream),
                 "slots"));
  std::vector<int32_t> rows(m.args.max_sample_rows);
  for (size_t r = 0; r < rows.size(); ++r) rows[r] = int32_t(r);
  SL_TRY(d.check(d.to_device(m.every_row, rows.data(), 4 * rows.size(), m.stream), "constants"));
  SL_TRY(d.check(d.to_device(m.cos, cos.data(), 4 * cos.size(), m.stream), "the rope table"));
  SL_TRY(d.check(d.to_device(m.sin, sin.data(), 4 * sin.size(), m.stream), "the rope table"));
  SL_TRY(warm_products(m));
  return d.check(d.stream_wait(m.stream), "filling the workspace");
}

inline sl_status use_workspace(Model& m, char* workspace) {
  bind_workspace(m, workspace);
  return fill_workspace(m, m.rope_cos, m.rope_sin);
}

inline sl_status read_table(Model* m) {
  SL_TRY(read_own_table(&m->table));
  const Table& t = m->table;
  m->shape = {t.fact("layers"),   t.fact("hidden"), t.fact("kv_heads"),
              t.fact("head_dim"), t.fact("vocab"),  t.fact("head_dim")};
  return SL_OK;
}

inline sl_status open_driver(Model* m) {
  return m->driver.open(m->table.device.compare(0, 3, "gfx") == 0);
}

inline sl_status tell_memory(const sl_memory_args& a) {
  if (!a.out_free || !a.out_total || !a.out_workspace)
    return fail(SL_INVALID, "sl_memory: a required pointer is null");
  Model m;
  SL_TRY(read_table(&m));
  SL_TRY(sl::check_range("max_tokens", a.max_tokens, 1, 1 << 20));
  SL_TRY(sl::check_range("max_seqs", a.max_seqs, 1, a.max_tokens));
  SL_TRY(sl::check_range("max_sample_rows", a.max_sample_rows, 1, a.max_tokens));
  SL_TRY(sl::check_range("max_model_len", a.max_model_len, 1, 1 << 24));
  SL_TRY(sl::check_range("num_slots", a.num_slots, 0, 1 << 24));
  m.args.max_tokens = a.max_tokens;
  m.args.max_seqs = a.max_seqs;
  m.args.max_sample_rows = a.max_sample_rows;
  m.args.max_model_len = a.max_model_len;
  m.args.num_slots = a.num_slots;
  SL_TRY(open_driver(&m));
  size_t free = 0, total = 0;
  SL_TRY(m.driver.check(m.driver.memory(&free, &total), "asking for the memory of the device"));
  *a.out_free = free;
  *a.out_total = total;
  *a.out_workspace = lay_out(m).total;
  return SL_OK;
}

inline sl_status open_model(const sl_open_args& a, std::unique_ptr<Model>* out) {
  auto m = std::make_unique<Model>();
  SL_TRY(read_table(m.get()));
  const Table& t = m->table;
  SL_TRY(check_open(*m, a));
  m->args = a;
  m->graphs = !(a.flags & SL_OPEN_EAGER);
  SL_TRY(open_driver(m.get()));
  SL_TRY(m->driver.check(m->driver.stream_create(&m->own_stream, kNonBlocking), "a stream"));
  m->stream = m->own_stream;
  SL_TRY(load_kernels(*m));
  SL_TRY(m->vendor.open(t, m->driver.is_hip(), a.max_tokens));
  SL_TRY(load_weights(*m, a));
  make_rope(*m, &m->rope_cos, &m->rope_sin);
  const int64_t inputs = lay_out(*m).total - lay_out(*m).inputs;
  SL_TRY(m->staging.allocate_host(m->driver, inputs));
  SL_TRY(m->read_back.allocate_host(m->driver, 8 * int64_t{a.max_sample_rows}));
  m->buffers.resize(t.buffers.size());
  m->kv.k.resize(t.fact("layers"));
  m->kv.v.resize(t.fact("layers"));
  SL_TRY(bind_arguments(*m));
  if (!(a.flags & SL_OPEN_BORROW)) {
    SL_TRY(m->own_workspace.allocate(m->driver, lay_out(*m).total, "activations"));
    SL_TRY(use_workspace(*m, m->own_workspace.data()));
  }
  m->sampling.resize(a.max_sample_rows);
  m->slots.assign(a.num_slots, -1);
  m->pool = std::make_unique<sl::Pool>(1, nullptr);
  if (!m->pool->ok() || !m->sampler.reserve(1, m->shape.V, a.max_sample_rows))
    return fail(SL_NO_MEMORY, "no memory for sampling");
  *out = std::move(m);
  return SL_OK;
}

inline sl_status bind(Model& m, const sl_bind_args& a) {
  if (!(m.args.flags & SL_OPEN_BORROW))
    return fail(SL_INVALID, "sl_bind needs a model that was opened with SL_OPEN_BORROW");
  const int64_t needed = lay_out(m).total;
  if (int64_t(a.workspace_bytes) < needed)
    return fail(SL_INVALID, "workspace_bytes is %llu and must be %lld",
                (unsigned long long)a.workspace_bytes, (long long)needed);
  if (!a.workspace || reinterpret_cast<uintptr_t>(a.workspace) % kAlign != 0)
    return fail(SL_INVALID, "workspace is not aligned to %d bytes", int(kAlign));
  SL_TRY(m.driver.make_current());
  m.stream = a.stream;
  return use_workspace(m, static_cast<char*>(a.workspace));
}

// Pages of the library's own: [layers][pages][heads][K, V][page_tokens][D], bf16 or fp8.
inline sl_status kv_alloc(Model& m, const sl_kv_args& a, sl_kv* out) {
  if (a.num_pages < 1 || a.page_tokens < 16 || a.page_tokens % 16 != 0)
    return fail(SL_INVALID, "num_pages is %d and page_tokens %d, a multiple of 16", a.num_pages,
                a.page_tokens);
  if (int64_t{a.num_pages} * a.page_tokens > INT32_MAX)
    return fail(SL_INVALID, "%d pages of %d tokens: places of tokens take 31 bits", a.num_pages,
                a.page_tokens);
  SL_TRY(m.driver.make_current());
  const int64_t head = int64_t{2} * a.page_tokens * m.shape.D, page = head * m.shape.Hkv;
  const int64_t layer = aligned(page * a.num_pages * m.kv_bytes());
  m.kv_blocks.emplace_back();
  const sl_status made =
      m.kv_blocks.back().allocate(m.driver, layer * m.shape.num_layers, "the KV cache");
  if (made != SL_OK) {
    m.kv_blocks.pop_back();
    return made;
  }
  if (m.args.flags & SL_OPEN_NOISE)
    SL_TRY(fill_noise(m, m.kv_blocks.back().data(), layer * m.shape.num_layers, Noise::kUnit));
  std::vector<void*> bases;
  for (int i = 0; i < m.shape.num_layers; ++i)
    bases.push_back(m.kv_blocks.back().data() + layer * i);
  m.kv_bases.push_back(std::move(bases));
  *out = {sizeof(sl_kv), a.num_pages, a.page_tokens,           m.shape.num_layers,
          page,          head,        m.kv_bases.back().data()};
  return SL_OK;
}

inline void kv_free(Model& m, sl_kv* kv) {
  auto block = m.kv_blocks.begin();
  for (auto bases = m.kv_bases.begin(); bases != m.kv_bases.end(); ++bases, ++block)
    if (bases->data() == kv->kv_base) {
      m.driver.make_current();
      m.kv_bases.erase(bases);
      m.kv_blocks.erase(block);
      kv->kv_base = nullptr;
      return;
    }
}

}  // namespace slg
