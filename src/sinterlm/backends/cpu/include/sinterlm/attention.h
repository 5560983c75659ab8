// Paged causal attention with grouped query heads, one routine for prefill and decode.
//
// Keys are walked in chunks of 256 on an absolute grid of positions. A chunk gives each row its own
// (max, sum, output); chunks merge in order. What a row computes depends on its position and window
// alone: a key it may not see gets probability exactly 0, which adds exactly nothing, so a row is
// the same bits by prefill, by decode, and beside any other row.
#pragma once
#include <cmath>

#include "sinterlm/qkv.h"

namespace sl {

constexpr int kChunk = 256;         // keys per chunk
constexpr int kAttentionRows = 48;  // query rows (tokens x heads of a group) per item

// One item's working set, in the worker's scratch.
template <class E, int D>
struct AttentionScratch {
  alignas(64) float score[kAttentionRows][kChunk];
  alignas(64) E prob[kAttentionRows][kChunk];
  alignas(64) E query[kAttentionRows][D];
  alignas(64) float part[kAttentionRows][D];  // of this chunk
  alignas(64) float out[kAttentionRows][D];   // of all chunks so far
  float max[kAttentionRows], sum[kAttentionRows];
  float part_max[kAttentionRows], part_sum[kAttentionRows];
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
template <class E, int D>
inline void score_chunk(AttentionScratch<E, D>& s, int rows, const Batch& b, const Pages<E>& pages,
                        const QueryBlock& q, const KeyRange& keys) {
  for (int pos = keys.first; pos < keys.last;) {
    const Slot<E> slot = find_slot(b, pages, q.seq, pos, q.kv_head);
    const int left = round_up(keys.last - pos, kLanes);
    const int n = std::min(left, pages.page_tokens - slot.index);
    panel_rows<E>(rows, n / kLanes, s.query[0], D, slot.page + int64_t(slot.index) * D,
                  kLanes * kPair<E>, int64_t(D) * kLanes, D, s.score[0] + (pos - keys.base), kChunk,
                  false);
    pos += n;
  }
}

// Masks, scales and exponentiates one row; leaves prob (0 where masked), part_max, part_sum.
template <class E, int D>
inline void softmax_row(AttentionScratch<E, D>& s, int r, const KeyRange& keys, int see_first,
                        int see_last, float scale) {
  const Vec none = set1(-INFINITY);
  const int begin = keys.first - keys.base, end = round_up(keys.last - keys.base, kLanes);
  Vec top = none;
  for (int j = begin; j < end; j += kLanes) {
    const int at = keys.base + j;
    const Vec v =
        keep_lanes(mul(load(s.score[r] + j), set1(scale)), see_first - at, see_last - at, none);
    store(s.score[r] + j, v);
    top = max(v, top);
  }
  const float m = reduce_max(top);
  Vec sum = zero();
  for (int j = begin; j < end; j += kLanes) {
    const Vec p = m == -INFINITY ? zero() : exp(sub(load(s.score[r] + j), set1(m)));
    sum = add(sum, p);
    store_elems(s.prob[r] + j, p);
  }
  s.part_max[r] = m;
  s.part_sum[r] = reduce_add(sum);
}

// part[r] = sum of prob[r][j] * v_(base + j)
template <class E, int D>
inline void weigh_chunk(AttentionScratch<E, D>& s, int rows, const Batch& b, const Pages<E>& pages,
                        const QueryBlock& q, const KeyRange& keys) {
  constexpr int P = kPair<E>;
  bool more = false;
  for (int pos = keys.first; pos < keys.last;) {
    const Slot<E> slot = find_slot(b, pages, q.seq, pos, q.kv_head);
    const int n = std::min(keys.last - pos, pages.page_tokens - slot.index);
    const E* v = slot.page + int64_t(pages.page_tokens) * D + int64_t(slot.index) * D;
    panel_rows<E>(rows, D / kLanes, s.prob[0] + (pos - keys.base), kChunk, v, D * P, kLanes * P,
                  round_up(n, P), s.part[0], D, more);
    more = true;
    pos += n;
  }
}

// (max, sum, out) of the chunks so far and of this one become one.
template <class E, int D>
inline void merge_row(AttentionScratch<E, D>& s, int r) {
  if (s.part_max[r] == -INFINITY) return;
  const float m = s.max[r] > s.part_max[r] ? s.max[r] : s.part_max[r];
  float pair[kLanes] = {s.max[r] - m, s.part_max[r] - m};
  store(pair, exp(load(pair)));
  const Vec old = set1(pair[0]), now = set1(pair[1]);
  s.sum[r] = s.sum[r] * pair[0] + s.part_sum[r] * pair[1];
  s.max[r] = m;
  for (int i = 0; i < D; i += kLanes)
    store(s.out[r] + i, fma(load(s.part[r] + i), now, mul(load(s.out[r] + i), old)));
}

template <class E, int D>
void attend(AttentionScratch<E, D>& s, const AttentionArgs<E>& p, const QueryBlock& q) {
  const Batch& b = *p.batch;
  const int rows = q.rows();
  for (int r = 0; r < rows; ++r) {
    const E* from = p.q + int64_t(q.t0 + r / q.G) * p.Qp + (q.kv_head * q.G + r % q.G) * D;
    std::memcpy(s.query[r], from, sizeof(E) * D);
    s.max[r] = -INFINITY;
    s.sum[r] = 0;
    std::memset(s.out[r], 0, sizeof(float) * D);
  }
  const int end = q.position + q.tokens;  // one past the last key any row sees
  const int start = p.window > 0 ? std::max(0, q.position - p.window + 1) : 0;
  for (int base = start / kChunk * kChunk; base < end; base += kChunk) {
    const KeyRange keys{base, std::max(base, start / kLanes * kLanes),
                        std::min(base + kChunk, end)};
    score_chunk(s, rows, b, p.pages, q, keys);
    for (int r = 0; r < rows; ++r) {
      const int pos = q.row_position(r);
      softmax_row(s, r, keys, p.window > 0 ? pos - p.window + 1 : 0, pos + 1, p.scale);
    }
    weigh_chunk(s, rows, b, p.pages, q, keys);
    for (int r = 0; r < rows; ++r) merge_row(s, r);
  }
  for (int r = 0; r < rows; ++r) {
    E* to = p.y + int64_t(q.t0 + r / q.G) * p.Qp + (q.kv_head * q.G + r % q.G) * D;
    const Vec scale = set1(1.0f / s.sum[r]);
    for (int i = 0; i < D; i += kLanes) store_elems(to + i, mul(load(s.out[r] + i), scale));
  }
}

// Query blocks per sequence, each at most `tokens` tokens.
inline int count_blocks(const Batch& b, int seq, int tokens) {
  return (b.query_start[seq + 1] - b.query_start[seq] + tokens - 1) / tokens;
}

template <class E, int D>
void attention(Worker& w, const AttentionArgs<E>& p) {
  const Batch& b = *p.batch;
  const int G = p.Hq / p.Hkv, tokens = std::max(1, kAttentionRows / G);
  auto& scratch = *static_cast<AttentionScratch<E, D>*>(w.scratch);
  int blocks = 0;
  for (int s = 0; s < b.num_seqs; ++s) blocks += count_blocks(b, s, tokens);
  w.for_each(blocks * p.Hkv, [&](int item) {
    // Longest contexts last in a sequence: take blocks from the back, so that the long ones start
    // first and the workers finish together.
    int block = blocks - 1 - item / p.Hkv, seq = 0;
    while (block >= count_blocks(b, seq, tokens)) block -= count_blocks(b, seq++, tokens);
    const int first = b.query_start[seq], len = b.query_start[seq + 1] - first;
    const int t0 = block * tokens, n = std::min(tokens, len - t0);
    attend(scratch, p,
           QueryBlock{seq, item % p.Hkv, first + t0, n, G, b.context_lens[seq] - len + t0});
  });
}

}  // namespace sl
