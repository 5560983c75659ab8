// From logits to tokens: greedy or seeded draws, log-probabilities, ranks and the n best.
//
// The vocabulary is cut into fixed blocks, merged in block order: nothing depends on the number of
// workers. A row that is drawn from its logits as they are, greedily or by noise, and tells nothing
// else of them, is drawn early: see() gets them from the head while they are in cache, and they are
// never written to memory. Of other rows scan() looks at (row, block) items; a row whose logits are
// changed or filtered is drawn whole by one worker. draw() finishes rows. A barrier between phases.
#pragma once
#include <atomic>
#include <vector>

#include "sinterlm/arena.h"
#include "sinterlm/sample_filter.h"
#include "sinterlm/threads.h"

namespace sl {

constexpr int kVocabBlock = 4096;
constexpr int kSpan = 64;  // ids drawn from at a time

struct SampleJob {
  const sl_sampling* rows;  // [num_rows]
  int num_rows;
  const float* logits;  // [num_rows][stride]; columns >= V are not read
  int64_t stride;
  int V;
  int max_logprobs;
  int32_t* tokens;           // [num_rows]
  float* logprobs;           // [num_rows], or null; NaN where none was asked for
  int32_t* ranks;            // [num_rows], or null; 0 where none was asked for
  int32_t* top_ids;          // [num_rows][max_logprobs], or null; -1 beyond what was asked for
  float* top_logprobs;       // [num_rows][max_logprobs], or null; NaN beyond what was asked for
  bool draws_early = false;  // see() is called with the logits of every row that is_early()
};

// What scan() leaves of one block of one row.
struct BlockStats {
  float max;   // of the raw logits
  float best;  // of the scores drawn from; valid for rows drawn block by block
  int32_t best_id;
  bool finite;
  double sum;  // of exp(logit - max), when log-probabilities are asked for
};

// Largest of z + noise over n ids first, first + 1, ...; ties go to the lower id.
inline Candidate draw_range(const float* z, int n, int first, float temperature,
                            const GumbelNoise& noise) {
  alignas(64) float score[kSpan];
  Candidate best{-INFINITY, -1};
  for (int at = 0; at < n; at += kSpan) {
    const int m = std::min(kSpan, n - at);
    for (int i = 0; i < kSpan; ++i) score[i] = i < m ? z[at + i] / temperature : -INFINITY;
    noise.add_to(score, kSpan, [&](int i) { return first + at + i; });
    bool finite;
    const float top = max_finite(score, m, &finite);
    if (top > best.z) best = {top, first + at + find_first(score, m, top)};
  }
  return best;
}

// Largest of z + noise over a list in any order; ties go to the lower id.
inline Candidate draw_list(const Candidate* picks, int n, const GumbelNoise& noise) {
  alignas(64) float score[kSpan];
  Candidate best{-INFINITY, -1};
  for (int at = 0; at < n; at += kSpan) {
    const int m = std::min(kSpan, n - at);
    for (int i = 0; i < kSpan; ++i) score[i] = i < m ? picks[at + i].z : -INFINITY;
    noise.add_to(score, kSpan, [&](int i) { return i < m ? picks[at + i].id : 0; });
    for (int i = 0; i < m; ++i) {
      const Candidate c{score[i], picks[at + i].id};
      if (best.id < 0 || better(c, best)) best = c;
    }
  }
  return best;
}

class Sampler {
 public:
  // Memory for `max_rows` rows of V logits; false when there is none.
  bool reserve(int workers, int V, int max_rows) {
    V_ = V;
    workers_ = workers;
    blocks_ = (V + kVocabBlock - 1) / kVocabBlock;
    spans_ = (V + kSpan - 1) / kSpan;
    early_.resize(max_rows);
    scanned_.reserve(max_rows);
    const size_t per_token = sizeof(float) + sizeof(uint32_t) + sizeof(Candidate);
    const size_t row = per_token * ((V + 63) / 64 * 64) + sizeof(double) * kMassBuckets;
    stride_ = (row + 4095) / 4096 * 4096;
    stats_arena_ = Arena::zeroed(sizeof(BlockStats) * blocks_ * max_rows);
    rows_arena_ = Arena::zeroed(stride_ * workers);
    spans_arena_ = Arena::zeroed(sizeof(Candidate) * spans_ * max_rows);
    floors_arena_ = Arena::zeroed(floors_bytes(max_rows) * workers);
    return stats_arena_ && rows_arena_ && spans_arena_ && floors_arena_;
  }

  // Before the workers start.
  void begin(const SampleJob& job) {
    job_ = job;
    not_finite_.store(job.num_rows, std::memory_order_relaxed);
    none_allowed_.store(job.num_rows, std::memory_order_relaxed);
    scanned_.clear();
    for (int row = 0; row < job.num_rows; ++row) {
      const sl_sampling& s = job.rows[row];
      early_[row] = job.draws_early && s.num_logprobs < 0 && !drawn_whole(s);
      if (!early_[row]) scanned_.push_back(row);
    }
    for (int worker = 0; worker < workers_; ++worker)
      std::fill_n(floors(worker), job.num_rows, -INFINITY);
  }

  // Whether see() draws the row, so that its logits need not be kept.
  bool is_early(int row) const { return early_[row]; }

  // Logits of ids [first, first + kSpan) of an early row; `first` is a multiple of kSpan. Of greedy
  // rows a worker looks up where the largest stands only in spans that beat all it has seen.
  void see(int worker, int row, int first, const float* x) {
    const int n = std::min(kSpan, V_ - first);
    if (n <= 0) return;  // columns of padding
    const sl_sampling& s = job_.rows[row];
    bool finite;
    const float top = max_finite(x, n, &finite);
    Candidate& best = spans(row)[first / kSpan];
    if (!finite) {
      best = {-INFINITY, kNotFinite};
    } else if (s.temperature > 0) {
      best = draw_range(x, n, first, s.temperature, GumbelNoise(s.seed, s.position));
    } else if (float& floor = floors(worker)[row]; top < floor) {
      best = {-INFINITY, kBeaten};
    } else {
      floor = top;
      best = {top, first + find_first(x, n, top)};
    }
  }

  // Phase 1. A barrier before (the logits are complete) and after.
  void scan(Worker& w) {
    w.for_each(static_cast<int>(scanned_.size()) * blocks_, [&](int item) {
      const int row = scanned_[item / blocks_];
      const int block = item % blocks_, first = block * kVocabBlock;
      const int n = std::min(kVocabBlock, V_ - first);
      const sl_sampling& s = job_.rows[row];
      const float* x = logits(row) + first;
      BlockStats& b = stats(row)[block];
      b.max = max_finite(x, n, &b.finite);
      b.best = -INFINITY;
      b.sum = 0;
      if (!b.finite) return;
      if (s.num_logprobs >= 0) b.sum = sum_exp(x, n, b.max);
      if (drawn_whole(s)) return;
      Candidate c{b.max, 0};
      if (s.temperature > 0) {
        c = draw_range(x, n, first, s.temperature, GumbelNoise(s.seed, s.position));
      } else {
        c.id = first + find_first(x, n, b.max);
      }
      b.best = c.z;
      b.best_id = c.id;
    });
  }

  // Phase 2.
  void draw(Worker& w) {
    w.for_each(job_.num_rows, [&](int row) {
      Candidate best = is_early(row) ? best_of_spans(row) : best_of_blocks(row);
      if (best.id == kNotFinite) return note(not_finite_, row);
      if (drawn_whole(job_.rows[row])) best.id = draw_whole(w.id, row);
      if (best.id < 0) return note(none_allowed_, row);
      job_.tokens[row] = best.id;
      report(w.id, row, best.id);
    });
  }

  // After the workers are done: the first row that has no token, or -1. Others are drawn.
  int first_not_finite() const { return row_or_none(not_finite_); }
  int first_without_token() const { return row_or_none(none_allowed_); }

 private:
  static constexpr int32_t kNotFinite = -2, kBeaten = -1;

  bool drawn_whole(const sl_sampling& s) const {
    return changes_logits(s) || (s.temperature > 0 && filters(s, V_));
  }

  Candidate best_of_spans(int row) const {
    Candidate best{-INFINITY, -1};
    const Candidate* c = spans(row);
    for (int i = 0; i < spans_; ++i) {
      if (c[i].id == kNotFinite) return c[i];
      if (c[i].z > best.z) best = c[i];
    }
    return best;
  }
  Candidate best_of_blocks(int row) const {
    Candidate best{-INFINITY, -1};
    const BlockStats* b = stats(row);
    for (int i = 0; i < blocks_; ++i) {
      if (!b[i].finite) return {-INFINITY, kNotFinite};
      if (b[i].best > best.z) best = {b[i].best, b[i].best_id};
    }
    return best;
  }

  // The token of a row with changed or filtered logits; -1 when none is allowed.
  int32_t draw_whole(int worker, int row) {
    const sl_sampling& s = job_.rows[row];
    RowScratch r = scratch(worker);
    prepare_row(s, logits(row), V_, r);
    bool finite;
    const float top = max_finite(r.z, V_, &finite);
    if (top == -INFINITY) return -1;
    if (!(s.temperature > 0)) return find_first(r.z, V_, top);
    const GumbelNoise noise(s.seed, s.position);
    if (!filters(s, V_)) return draw_range(r.z, V_, 0, 1.0f, noise).id;
    int n;
    if (s.top_k > 0 && s.top_k < V_) {
      n = select_top(r.z, V_, s.top_k, r.picks);
      n = filter_list(s, r.picks, n);
    } else {
      n = filter_all(s, V_, top, r);
    }
    return draw_list(r.picks, n, noise).id;
  }

  // Log-probabilities are of the raw logits, whatever the row was drawn from.
  void report(int worker, int row, int32_t token) {
    const int asked = job_.rows[row].num_logprobs, width = job_.max_logprobs;
    const float* x = logits(row);  // of an early row nobody asks, and there are none
    const double norm = asked >= 0 ? log_normaliser(row) : NAN;
    if (job_.logprobs) job_.logprobs[row] = asked >= 0 ? static_cast<float>(x[token] - norm) : NAN;
    if (job_.ranks) job_.ranks[row] = asked >= 0 ? 1 + count_greater(x, V_, x[token]) : 0;
    if (width == 0) return;
    const int k = std::max(0, std::min(asked, V_));
    Candidate* picks = scratch(worker).picks;
    if (k > 0) select_top(x, V_, k, picks);
    for (int i = 0; i < width; ++i) {
      const int64_t at = int64_t(row) * width + i;
      job_.top_ids[at] = i < k ? picks[i].id : -1;
      job_.top_logprobs[at] = i < k ? static_cast<float>(picks[i].z - norm) : NAN;
    }
  }

  // log of the sum of exp over the raw logits.
  double log_normaliser(int row) const {
    const BlockStats* b = stats(row);
    float max = -INFINITY;
    for (int i = 0; i < blocks_; ++i) max = b[i].max > max ? b[i].max : max;
    double sum = 0;
    for (int i = 0; i < blocks_; ++i) sum += b[i].sum * exp_one(b[i].max - max);
    return max + log_double(sum);
  }

  static void note(std::atomic<int>& first, int row) {
    int seen = first.load(std::memory_order_relaxed);
    while (row < seen && !first.compare_exchange_weak(seen, row, std::memory_order_relaxed)) {
    }
  }
  int row_or_none(const std::atomic<int>& first) const {
    const int row = first.load(std::memory_order_relaxed);
    return row < job_.num_rows ? row : -1;
  }

  const float* logits(int row) const { return job_.logits + int64_t(row) * job_.stride; }
  BlockStats* stats(int row) const {
    return static_cast<BlockStats*>(stats_arena_.data()) + int64_t(row) * blocks_;
  }
  Candidate* spans(int row) const {
    return static_cast<Candidate*>(spans_arena_.data()) + int64_t(row) * spans_;
  }
  // The largest logit of each row that a worker has seen, on lines of its own.
  static size_t floors_bytes(int rows) { return (rows * sizeof(float) + 127) / 128 * 128; }
  float* floors(int worker) const {
    return static_cast<float*>(floors_arena_.data()) +
           floors_bytes(static_cast<int>(early_.size())) / sizeof(float) * worker;
  }
  RowScratch scratch(int worker) const {
    char* p = static_cast<char*>(rows_arena_.data()) + stride_ * worker;
    const int64_t n = (V_ + 63) / 64 * 64;
    return {reinterpret_cast<float*>(p), reinterpret_cast<uint32_t*>(p + 4 * n),
            reinterpret_cast<Candidate*>(p + 8 * n), reinterpret_cast<double*>(p + 16 * n)};
  }

  SampleJob job_{};
  int V_ = 0, workers_ = 0, blocks_ = 0, spans_ = 0;
  size_t stride_ = 0;  // bytes of one worker's RowScratch
  Arena stats_arena_, rows_arena_, spans_arena_, floors_arena_;
  std::vector<uint8_t> early_;  // [num_rows]
  std::vector<int> scanned_;    // the other rows
  std::atomic<int> not_finite_{0}, none_allowed_{0};
};

}  // namespace sl
