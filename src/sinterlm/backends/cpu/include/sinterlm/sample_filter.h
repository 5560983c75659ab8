// One row's logits made into the candidates of its draw: bias, mask, penalties, temperature, then
// min_p, top_k and top_p. The sets kept are prefixes of one order: value descending, id ascending.
#pragma once
#include <algorithm>
#include <cstdint>

#include "abi.h"
#include "sinterlm/math.h"

namespace sl {

struct Candidate {
  float z;
  int32_t id;
};
inline bool better(const Candidate& a, const Candidate& b) {
  return a.z > b.z || (a.z == b.z && a.id < b.id);
}

constexpr int kMassBuckets = 1024;

// One worker's buffers for one row at a time.
struct RowScratch {
  float* z;          // [V] logits as the draw sees them
  uint32_t* counts;  // [V] all zero between rows
  Candidate* picks;  // [V]
  double* mass;      // [kMassBuckets]
};

inline bool has_penalty(const sl_sampling& s) {
  return s.repetition_penalty != 1.0f || s.presence_penalty != 0.0f || s.frequency_penalty != 0.0f;
}
inline bool changes_logits(const sl_sampling& s) {
  return s.num_bias > 0 || s.allowed != nullptr || has_penalty(s);
}
inline bool filters(const sl_sampling& s, int V) {
  return (s.top_k > 0 && s.top_k < V) || s.top_p < 1.0f || s.min_p > 0.0f;
}

// As vLLM defines them: repetition over prompt and output, frequency and presence over the output.
inline void apply_penalties(const sl_sampling& s, RowScratch& row) {
  constexpr uint32_t kInPrompt = 1u << 31;
  for (int i = 0; i < s.num_prompt_tokens; ++i) row.counts[s.prompt_tokens[i]] = kInPrompt;
  for (int i = 0; i < s.num_output_tokens; ++i) ++row.counts[s.output_tokens[i]];
  const auto apply = [&](int32_t id) {
    const uint32_t seen = row.counts[id];
    if (seen == 0) return;  // applied already
    row.counts[id] = 0;
    const float count = static_cast<float>(seen & ~kInPrompt);
    float v = row.z[id];
    v = v > 0 ? v / s.repetition_penalty : v * s.repetition_penalty;
    v -= s.frequency_penalty * count;
    if (count > 0) v -= s.presence_penalty;
    row.z[id] = v;
  };
  for (int i = 0; i < s.num_prompt_tokens; ++i) apply(s.prompt_tokens[i]);
  for (int i = 0; i < s.num_output_tokens; ++i) apply(s.output_tokens[i]);
}

// row.z = the row's logits with bias, allowed mask, penalties and (unless greedy) temperature.
inline void prepare_row(const sl_sampling& s, const float* logits, int V, RowScratch& row) {
  std::memcpy(row.z, logits, sizeof(float) * V);
  for (int i = 0; i < s.num_bias; ++i) row.z[s.bias_ids[i]] += s.bias[i];
  if (s.allowed)
    for (int i = 0; i < V; ++i)
      if (!(s.allowed[i / 32] >> (i % 32) & 1u)) row.z[i] = -INFINITY;
  if (has_penalty(s)) apply_penalties(s, row);
  if (s.temperature > 0)
    for (int i = 0; i < V; ++i) row.z[i] /= s.temperature;
}

// The k best of z[0..V), best first; masked tokens (-inf) never. Returns how many there are.
inline int select_top(const float* z, int V, int k, Candidate* out) {
  int n = 0;
  for (int first = 0; first < V; first += 64) {
    const int last = std::min(V, first + 64);
    if (n == k) {  // a later id wins only with a greater value
      bool any = false;
      for (int i = first; i < last; ++i) any |= z[i] > out[0].z;
      if (!any) continue;
    }
    for (int i = first; i < last; ++i) {
      if (z[i] == -INFINITY) continue;
      if (n == k) {
        if (!(z[i] > out[0].z)) continue;
        std::pop_heap(out, out + n--, better);
      }
      out[n++] = {z[i], i};
      std::push_heap(out, out + n, better);
    }
  }
  std::sort_heap(out, out + n, better);
  return n;
}

// How many of the first n candidates (best first) reach `mass`; at least one.
inline int prefix_of_mass(const Candidate* picks, int n, float top, double mass, double* total) {
  for (int i = 0; i < n; ++i) {
    *total += exp_one(picks[i].z - top);
    if (*total >= mass) return i + 1;
  }
  return n;
}

// min_p and top_p on a short list, best first. Returns the length of the prefix kept.
inline int filter_list(const sl_sampling& s, const Candidate* picks, int n) {
  const float top = picks[0].z;
  double total = 0;
  int kept = 0;
  for (; kept < n; ++kept) {
    const float e = exp_one(picks[kept].z - top);
    if (e < s.min_p) break;
    total += e;
  }
  if (s.top_p >= 1.0f) return kept;
  double sum = 0;
  return prefix_of_mass(picks, kept, top, double{s.top_p} * total, &sum);
}

// min_p and top_p on the whole vocabulary, without sorting it: probabilities are added up in
// buckets of 1/32 of log-probability, and only the bucket in which the mass reaches top_p is
// sorted. Returns how many candidates are kept (in row.picks, in no order).
inline int filter_all(const sl_sampling& s, int V, float top, RowScratch& row) {
  constexpr int kSpan = 256;
  float e[kSpan];
  std::fill_n(row.mass, kMassBuckets, 0.0);
  const auto bucket_of = [&](float z) {
    const float distance = (top - z) * 32.0f;
    return distance < kMassBuckets - 1 ? static_cast<int>(distance) : kMassBuckets - 1;
  };
  const auto visit = [&](auto&& fn) {
    for (int first = 0; first < V; first += kSpan) {
      const int n = std::min(kSpan, V - first);
      exp_shifted(row.z + first, n, top, e);
      for (int i = 0; i < n; ++i)
        if (e[i] > 0 && e[i] >= s.min_p) fn(first + i, bucket_of(row.z[first + i]), e[i]);
    }
  };
  int sure = 0;  // picks that are kept for certain
  if (s.top_p >= 1.0f) {
    visit([&](int id, int, float) { row.picks[sure++] = {row.z[id], id}; });
    return sure;
  }
  visit([&](int, int bucket, float mass) { row.mass[bucket] += mass; });
  double total = 0, below = 0;
  for (int i = 0; i < kMassBuckets; ++i) total += row.mass[i];
  const double wanted = double{s.top_p} * total;
  int edge = 0;  // the bucket in which the mass is reached
  while (edge < kMassBuckets - 1 && below + row.mass[edge] < wanted) below += row.mass[edge++];
  int unsure = V;  // picks of that bucket, from the back
  visit([&](int id, int bucket, float) {
    if (bucket < edge) row.picks[sure++] = {row.z[id], id};
    if (bucket == edge) row.picks[--unsure] = {row.z[id], id};
  });
  Candidate* last = row.picks + unsure;
  std::sort(last, row.picks + V, better);
  const int n = prefix_of_mass(last, V - unsure, top, wanted, &below);
  std::copy(last, last + n, row.picks + sure);
  return sure + n;
}

}  // namespace sl
