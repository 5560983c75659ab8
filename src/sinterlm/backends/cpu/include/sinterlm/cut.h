// How the outputs of one GEMM are shared out among the workers.
//
// An op finishes its outputs in granules of columns: 16 lanes, a group of activations, a head.
// Items are whole units of columns (a panel, a head) as long as every worker gets one; the units
// that are left over are cut into slices, so that the last round is even too. Where a slice is less
// than a granule, its sums go to memory that the workers share, and whoever brings the last of them
// finishes the granule. Each output is one chain of sums, so no cut shows in the result.
#pragma once
#include <algorithm>

#include "sinterlm/args.h"
#include "sinterlm/threads.h"

namespace sl {

constexpr int kRowBlock = 96;  // rows per pass over a panel: their operands stay in L2

// Columns and rows of one item.
struct Block {
  int c0, c1, r0, r1;
};

class Cut {
 public:
  // `cols` and `unit` are multiples of 16, `unit` one of `granule`.
  Cut(int cols, int rows, int unit, int granule, const Team& team)
      : cols_(cols), rows_(rows), unit_(unit), granule_(granule), slice_(unit), height_(rows) {
    const int units = (cols + unit - 1) / unit, workers = team.count;
    whole_ = units / workers * workers;
    if (whole_ * unit > cols) --whole_;  // a last unit that is not whole is cut
    const int left = cols - whole_ * unit;
    while ((whole_ + left / kLanes) * down() < 4 * workers && height_ > kRowBlock / 2)
      height_ = (height_ + 1) / 2;
    const bool joins = fits(team, left);
    const auto rounds = [&](int slice) {  // columns that the busiest worker computes
      return ((left + slice - 1) / slice * down() + workers - 1) / workers * slice;
    };
    for (int parts = 2; parts <= unit / kLanes; ++parts) {  // wide slices stream better
      const int slice = unit / parts;
      if (unit % (parts * kLanes) != 0 || (slice < granule && !joins)) continue;
      if (rounds(slice) * 10 < rounds(slice_) * 9) slice_ = slice;
    }
    across_ = whole_ + (left + slice_ - 1) / slice_;
  }

  int items() const { return across_ * down(); }

  Block operator[](int item) const {
    const int across = item / down(), r0 = item % down() * height_;
    const int r1 = std::min(rows_, r0 + height_);
    if (across < whole_) return {across * unit_, (across + 1) * unit_, r0, r1};
    const int c0 = whole_ * unit_ + (across - whole_) * slice_;
    return {c0, std::min(cols_, c0 + slice_), r0, r1};
  }

  // Whether a block is a slice of a granule that several items compute.
  bool is_shared(const Block& b) const { return b.c1 - b.c0 < granule_; }
  int granule() const { return granule_; }
  // First column of the granule that column c belongs to; granules of slices begin after the units.
  int granule_of(int c) const { return c / granule_ * granule_; }

  // Where the sums of row r and column c of a granule wait: [granule][row][column].
  float* sums(const Team& team, int c, int r) const {
    const int first = granule_of(c);
    const int64_t at = int64_t(first - whole_ * unit_) * rows_ + int64_t(r) * granule_;
    return team.sums() + at + (c - first);
  }

  // Called once for each slice, its sums written; true for the last one of its granule and rows.
  bool is_last(Team& team, const Block& b) const {
    const int number = (granule_of(b.c0) - whole_ * unit_) / granule_;
    std::atomic<int>& brought = team.brought(number * down() + b.r0 / height_);
    if (brought.fetch_add(1, std::memory_order_acq_rel) + 1 < granule_ / slice_) return false;
    brought.store(0, std::memory_order_relaxed);  // for the next op, which a barrier separates
    return true;
  }

 private:
  int down() const { return (rows_ + height_ - 1) / height_; }  // row blocks, innermost

  // Whether slices of granules may be: the workers' memory holds `left` columns of every row.
  bool fits(const Team& team, int left) const {
    return left % granule_ == 0 && int64_t(left) * rows_ <= team.num_sums() &&
           left / granule_ * down() <= team.num_brought();
  }

  int cols_, rows_, unit_, granule_, slice_, height_;  // height_: rows of an item
  int whole_, across_;                                 // items side by side: units; all
};

// Runs the items this worker claims. compute(r, n, c0, c1, c, ld) leaves n rows from r of columns
// [c0, c1) in c[n][ld]; finish(row, c0, c1, c) gets whole granules of one row, and may change c.
template <class Compute, class Finish>
inline void in_blocks(Worker& w, const Cut& cut, int ld, Compute&& compute, Finish&& finish) {
  w.for_each(cut.items(), [&](int item) {
    const Block b = cut[item];
    const bool shared = cut.is_shared(b);
    for (int r = b.r0; r < b.r1; r += kRowBlock) {
      const int n = std::min(kRowBlock, b.r1 - r);
      if (shared) {
        compute(r, n, b.c0, b.c1, cut.sums(*w.team, b.c0, r), cut.granule());
        continue;
      }
      float* c = static_cast<float*>(w.scratch);
      compute(r, n, b.c0, b.c1, c, ld);
      for (int i = 0; i < n; ++i) finish(r + i, b.c0, b.c1, c + i * ld);
    }
    if (!shared || !cut.is_last(*w.team, b)) return;
    const int first = cut.granule_of(b.c0);
    for (int r = b.r0; r < b.r1; ++r)
      finish(r, first, first + cut.granule(), cut.sums(*w.team, first, r));
  });
}

}  // namespace sl
