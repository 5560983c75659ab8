// Paged causal attention with grouped query heads, one routine for prefill and decode.
//
// Keys are walked in chunks of 256 on an absolute grid of positions. A chunk gives each row its own
// (max, sum, output); chunks merge in order. What a row computes depends on its position and window
// alone: a key it may not see gets probability exactly 0, which adds exactly nothing, so a row is
// the same bits by prefill, by decode, and beside any other row.
//
// C is what pages hold: E, or codes. Codes are widened to fp32 as a tile loads them, which costs
// what taking bf16 pairs apart costs, needs no instruction that some level lacks, and leaves the
// order of sums alone. The scale of a key multiplies its score, that of a value its probability,
// which then stays in fp32.
#pragma once
#include <cmath>

#include "sinterlm/lines_ahead.h"
#include "sinterlm/qkv.h"

namespace sl {

constexpr int kChunk = 256;  // keys per chunk
static_assert(LinesAhead::kMost >= 2 * (kChunk / kLanes + 1), "both halves of the smallest pages");
constexpr int kSoftmaxLines = 2;    // asked for with each 16 keys of a row
constexpr int kAttentionRows = 48;  // query rows (tokens x heads of a group) per item

// What the scores of a chunk's keys and the probabilities of its values are multiplied by.
template <class C>
struct ChunkScales {
  template <int D>
  void take(int, const Slot<C>&, int, int) {}
  Vec score(int, Vec v) const { return v; }
  Vec prob(int, Vec p, int, int) const { return p; }
};
template <>
struct ChunkScales<code8> {
  alignas(64) float key[kChunk];
  alignas(64) float value[kChunk];

  // Those of `n` tokens from a slot on, the chunk's from key j on.
  template <int D>
  void take(int j, const Slot<code8>& slot, int n, int page_tokens) {
    const size_t bytes = n * sizeof(float);
    code8* v = v_half<code8, D>(slot.page, page_tokens);
    std::memcpy(key + j, scales_of<D>(slot.page, page_tokens) + slot.index, bytes);
    std::memcpy(value + j, scales_of<D>(v, page_tokens) + slot.index, bytes);
  }
  Vec score(int j, Vec v) const { return mul(v, load(key + j)); }
  // 0 outside [see_first, see_last): there a scale may be anything.
  Vec prob(int j, Vec p, int see_first, int see_last) const {
    return keep_lanes(mul(p, load(value + j)), see_first, see_last, zero());
  }
};

// One item's working set, in the worker's scratch.
template <class C, int D>
struct AttentionScratch {
  alignas(64) float score[kAttentionRows][kChunk];
  alignas(64) Operand<C> prob[kAttentionRows][kChunk];
  alignas(64) Operand<C> query[kAttentionRows][D];
  alignas(64) float part[kAttentionRows][D];  // of this chunk
  alignas(64) float out[kAttentionRows][D];   // of all chunks so far
  float max[kAttentionRows], sum[kAttentionRows];
  float part_max[kAttentionRows], part_sum[kAttentionRows];
  ChunkScales<C> scales;
  LinesAhead ahead;
};

// The query rows of one item: tokens [t0, t0 + tokens) of a sequence, all G heads of one KV head.
struct QueryBlock {
  int seq, kv_head, t0, tokens, G, position;  // position of token t0
  int rows() const { return tokens * G; }
  int row_position(int r) const { return position + r / G; }
};

// Keys of one chunk that some row of the block may see: [first, last), first a multiple of 16.
struct KeyRange {
  int base, first, last;
};

// score[r][j] = q_r . k_(base + j), unscaled, for the chunk's keys rounded out to 16.
template <class C, int D>
inline void score_chunk(AttentionScratch<C, D>& s, int rows, const Batch& b, const Pages<C>& pages,
                        const QueryBlock& q, const KeyRange& keys) {
  for (int pos = keys.first; pos < keys.last;) {
    const Slot<C> slot = find_slot(b, pages, q.seq, pos, q.kv_head);
    const int left = round_up(keys.last - pos, kLanes), j = pos - keys.base;
    const int n = std::min(left, pages.page_tokens - slot.index);
    const C* k = slot.page + int64_t(slot.index) * D;
    wide_rows(rows, n / kLanes,
              WideTile<C, KeysAhead>{s.query[0],
                                     D,
                                     k,
                                     kLanes * kPair<C>,
                                     int64_t(D) * kLanes,
                                     D,
                                     s.score[0] + j,
                                     kChunk,
                                     false,
                                     {&s.ahead}});
    s.scales.template take<D>(j, slot, n, pages.page_tokens);
    pos += n;
  }
}

// Masks, scales and exponentiates one row; leaves prob (0 where masked), part_max, part_sum.
template <class C, int D>
inline void softmax_row(AttentionScratch<C, D>& s, int r, const KeyRange& keys, int see_first,
                        int see_last, float scale) {
  const Vec none = set1(-INFINITY);
  const int begin = keys.first - keys.base, end = round_up(keys.last - keys.base, kLanes);
  Vec top = none;
  for (int j = begin; j < end; j += kLanes) {
    const int at = keys.base + j;
    const Vec scaled = mul(s.scales.score(j, load(s.score[r] + j)), set1(scale));
    const Vec v = keep_lanes(scaled, see_first - at, see_last - at, none);
    store(s.score[r] + j, v);
    top = max(v, top);
    s.ahead.ask(kSoftmaxLines);
  }
  const float m = reduce_max(top);
  Vec sum = zero();
  for (int j = begin; j < end; j += kLanes) {
    const Vec p = m == -INFINITY ? zero() : exp(sub(load(s.score[r] + j), set1(m)));
    sum = add(sum, p);
    const int at = keys.base + j;
    round_operands<C>(s.prob[r] + j, s.scales.prob(j, p, see_first - at, see_last - at));
    s.ahead.ask(kSoftmaxLines);
  }
  s.part_max[r] = m;
  s.part_sum[r] = reduce_add(sum);
}

// part[r] = sum of prob[r][j] * v_(base + j).
template <class C, int D>
inline void weigh_chunk(AttentionScratch<C, D>& s, int rows, const Batch& b, const Pages<C>& pages,
                        const QueryBlock& q, const KeyRange& keys) {
  constexpr int P = kPair<C>;
  bool more = false;
  for (int pos = keys.first; pos < keys.last;) {
    const Slot<C> slot = find_slot(b, pages, q.seq, pos, q.kv_head);
    const int n = std::min(keys.last - pos, pages.page_tokens - slot.index);
    const C* v = v_half<C, D>(slot.page, pages.page_tokens) + int64_t(slot.index) * D;
    const WideTile<C, KeysAhead> tile{s.prob[0] + (pos - keys.base),
                                      kChunk,
                                      v,
                                      D * P,
                                      kLanes * P,
                                      round_up(n, P),
                                      s.part[0],
                                      D,
                                      more,
                                      {&s.ahead}};
    wide_rows(rows, D / kLanes, tile, kLanes);  // blocks that begin and end with any page
    more = true;
    pos += n;
  }
}

// What one chunk gives one row.
struct Part {
  const float* out;  // [D]
  float max, sum;
};

// (max, sum, out) of the chunks so far and of one more become one.
template <class C, int D>
inline void merge_row(AttentionScratch<C, D>& s, int r, const Part& part) {
  if (part.max == -INFINITY) return;
  if (s.max[r] == -INFINITY) {
    s.max[r] = part.max;
    s.sum[r] = part.sum;
    std::memcpy(s.out[r], part.out, sizeof s.out[r]);
    return;
  }
  const float m = s.max[r] > part.max ? s.max[r] : part.max;
  float pair[kLanes] = {s.max[r] - m, part.max - m};
  store(pair, exp(load(pair)));
  const Vec old = set1(pair[0]), now = set1(pair[1]);
  s.sum[r] = s.sum[r] * pair[0] + part.sum * pair[1];
  s.max[r] = m;
  for (int i = 0; i < D; i += kLanes)
    store(s.out[r] + i, fma(load(part.out + i), now, mul(load(s.out[r] + i), old)));
}

// The chunks that some row of a block sees: bases [first, last) in steps of kChunk.
struct ChunkRange {
  int first, last, start, end;  // start, end: the keys themselves
  int count() const { return (last - first + kChunk - 1) / kChunk; }
};

inline ChunkRange chunks_of(const QueryBlock& q, int window) {
  const int end = q.position + q.tokens;
  const int start = window > 0 ? std::max(0, q.position - window + 1) : 0;
  return {start / kChunk * kChunk, end, start, end};
}

template <class E, class C, int D, class Next>
inline void load_query(AttentionScratch<C, D>& s, const AttentionArgs<E, C, Next>& p,
                       const QueryBlock& q) {
  for (int r = 0; r < q.rows(); ++r) {
    const E* from = p.q + int64_t(q.t0 + r / q.G) * p.Qp + (q.kv_head * q.G + r % q.G) * D;
    for (int i = 0; i < D; i += kLanes) store_operands(s.query[r] + i, from + i);
  }
}

// Those that some row of the block may see of the chunk at `base`.
inline KeyRange keys_of(const ChunkRange& range, int base) {
  return {base, std::max(base, range.start / kLanes * kLanes), std::min(base + kChunk, range.end)};
}

// Will ask for keys [first, end) of a sequence and head, then for their values.
template <class C, int D>
inline void look_ahead(LinesAhead& ahead, const Batch& b, const Pages<C>& pages,
                       const QueryBlock& q, int first, int end) {
  const auto pieces = [&](bool values) {
    for (int pos = first; pos < end;) {
      const Slot<C> slot = find_slot(b, pages, q.seq, pos, q.kv_head);
      const int n = std::min(end - pos, pages.page_tokens - slot.index);
      const C* half = values ? v_half<C, D>(slot.page, pages.page_tokens) : slot.page;
      ahead.add(half + int64_t(slot.index) * D, int64_t(n) * D * int64_t{sizeof(C)});
      pos += n;
    }
  };
  pieces(false);
  pieces(true);
}

// One chunk of one block: leaves part, part_max, part_sum of every row. After the block's last one
// the keys of `later`, if any, are read.
template <class E, class C, int D, class Next>
inline void attend_chunk(AttentionScratch<C, D>& s, const AttentionArgs<E, C, Next>& p,
                         const QueryBlock& q, const ChunkRange& range, int base,
                         const QueryBlock* later = nullptr) {
  const KeyRange keys = keys_of(range, base);
  s.ahead.clear();
  if (base + kChunk < range.last) {
    const KeyRange next = keys_of(range, base + kChunk);
    look_ahead<C, D>(s.ahead, *p.batch, p.pages, q, next.first, next.last);
  } else if (later) {
    const ChunkRange chunks = chunks_of(*later, p.window);
    const KeyRange next = keys_of(chunks, chunks.first);
    look_ahead<C, D>(s.ahead, *p.batch, p.pages, *later, next.first, next.last);
  }
  score_chunk(s, q.rows(), *p.batch, p.pages, q, keys);
  for (int r = 0; r < q.rows(); ++r) {
    const int pos = q.row_position(r);
    softmax_row(s, r, keys, p.window > 0 ? pos - p.window + 1 : 0, pos + 1, p.scale);
  }
  weigh_chunk(s, q.rows(), *p.batch, p.pages, q, keys);
  s.ahead.ask_rest();
}

template <class C, int D>
inline void start_rows(AttentionScratch<C, D>& s, int rows) {
  for (int r = 0; r < rows; ++r) {
    s.max[r] = -INFINITY;
    s.sum[r] = 0;
    std::memset(s.out[r], 0, sizeof(float) * D);
  }
}

template <class E, class C, int D, class Next>
inline void store_rows(AttentionScratch<C, D>& s, const AttentionArgs<E, C, Next>& p,
                       const QueryBlock& q) {
  for (int r = 0; r < q.rows(); ++r) {
    static_assert(D % Next::kUnit == 0, "a head must be whole groups of activations");
    const Vec scale = set1(1.0f / s.sum[r]);
    for (int i = 0; i < D; i += kLanes) store(s.out[r] + i, mul(load(s.out[r] + i), scale));
    const int first = (q.kv_head * q.G + r % q.G) * D;
    for (int i = 0; i < D; i += Next::kUnit)
      Next::store(p.y.row(q.t0 + r / q.G), p.Qp, first + i, s.out[r] + i);
  }
}

// The query blocks of a step; item i is one block for one KV head.
class Blocks {
 public:
  Blocks(const Batch& b, int Hq, int Hkv)
      : batch_(b), G_(Hq / Hkv), Hkv_(Hkv), tokens_(std::max(1, kAttentionRows / G_)) {
    for (int s = 0; s < b.num_seqs; ++s) blocks_ += in_seq(s);
  }
  int items() const { return blocks_ * Hkv_; }
  // From the back, so that blocks with long contexts start first and workers finish together.
  QueryBlock operator[](int item) const {
    int block = blocks_ - 1 - item / Hkv_, seq = 0;
    if (blocks_ == batch_.num_seqs)
      std::swap(block, seq);  // one of each
    else
      while (block >= in_seq(seq)) block -= in_seq(seq++);
    const int first = batch_.query_start[seq], len = batch_.query_start[seq + 1] - first;
    const int t0 = block * tokens_, n = std::min(tokens_, len - t0);
    return {seq, item % Hkv_, first + t0, n, G_, batch_.context_lens[seq] - len + t0};
  }

 private:
  int in_seq(int s) const {
    return (batch_.query_start[s + 1] - batch_.query_start[s] + tokens_ - 1) / tokens_;
  }
  const Batch& batch_;
  int G_, Hkv_, tokens_, blocks_ = 0;
};

// Where parts wait to be merged when the chunks of a block go to different workers:
// [item][chunk][row][D + 2], the last two being max and sum.
struct Split {
  int chunks = 1, rows = 0;  // most of any item
  Split(const Blocks& blocks, int window) {
    for (int i = 0; i < blocks.items(); ++i) {
      const QueryBlock q = blocks[i];
      chunks = std::max(chunks, chunks_of(q, window).count());
      rows = std::max(rows, q.rows());
    }
  }
  int64_t floats(int items, int D) const { return int64_t(items) * chunks * rows * (D + 2); }
  float* row(float* parts, int item, int chunk, int r, int D) const {
    return parts + ((int64_t(item) * chunks + chunk) * rows + r) * (D + 2);
  }
};

// Few blocks, long contexts: chunks are the items, merged in order afterwards. The same sums in the
// same order as attend_blocks, so which of the two runs does not show in the result.
template <class E, int D, class C, class Next>
void attend_split(Worker& w, const AttentionArgs<E, C, Next>& p, const Blocks& blocks,
                  const Split& split) {
  auto& s = *static_cast<AttentionScratch<C, D>*>(w.scratch);
  w.for_each(blocks.items() * split.chunks, [&](int i) {
    const int item = i / split.chunks, chunk = i % split.chunks;
    const QueryBlock q = blocks[item];
    const ChunkRange range = chunks_of(q, p.window);
    if (chunk >= range.count()) return;
    load_query(s, p, q);
    attend_chunk(s, p, q, range, range.first + chunk * kChunk);
    for (int r = 0; r < q.rows(); ++r) {
      float* to = split.row(p.parts, item, chunk, r, D);
      std::memcpy(to, s.part[r], sizeof(float) * D);
      to[D] = s.part_max[r];
      to[D + 1] = s.part_sum[r];
    }
  });
  w.barrier();
  w.for_each(blocks.items(), [&](int item) {
    const QueryBlock q = blocks[item];
    start_rows(s, q.rows());
    const int chunks = chunks_of(q, p.window).count();
    for (int chunk = 0; chunk < chunks; ++chunk)
      for (int r = 0; r < q.rows(); ++r) {
        const float* from = split.row(p.parts, item, chunk, r, D);
        merge_row(s, r, {from, from[D], from[D + 1]});
      }
    store_rows(s, p, q);
  });
}

template <class E, int D, class C, class Next>
void attend_blocks(Worker& w, const AttentionArgs<E, C, Next>& p, const Blocks& blocks) {
  auto& s = *static_cast<AttentionScratch<C, D>*>(w.scratch);
  int next_item = -1;
  QueryBlock next;
  w.for_each(blocks.items(), [&](int item) {
    const QueryBlock q = item == next_item ? next : blocks[item];
    next_item = item + 1;
    const bool more = next_item < blocks.items();
    if (more) next = blocks[next_item];  // most likely ours, too
    const ChunkRange range = chunks_of(q, p.window);
    load_query(s, p, q);
    start_rows(s, q.rows());
    for (int base = range.first; base < range.last; base += kChunk) {
      attend_chunk(s, p, q, range, base, more ? &next : nullptr);
      for (int r = 0; r < q.rows(); ++r) merge_row(s, r, {s.part[r], s.part_max[r], s.part_sum[r]});
    }
    store_rows(s, p, q);
  });
}

template <class E, int D, class C, class Next>
void attention(Worker& w, const AttentionArgs<E, C, Next>& p) {
  const Blocks blocks(*p.batch, p.Hq, p.Hkv);
  if (blocks.items() < 4 * w.count && w.count > 1) {
    const Split split(blocks, p.window);
    if (split.chunks > 1 && split.floats(blocks.items(), D) <= p.parts_floats) {
      attend_split<E, D>(w, p, blocks, split);
      return;
    }
  }
  attend_blocks<E, D>(w, p, blocks);
}

}  // namespace sl
