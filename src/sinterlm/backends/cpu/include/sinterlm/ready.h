// Columns of weights made ready: 16 columns of a panel for a few hundred k, in the form that the
// register tile multiplies, side by side.
//
// In a panel their lines lie 256 bytes apart, so that few of them share L1 with the operands, and
// each tile of rows would read them again from L2 and take them apart again. Where registers are
// few they are made ready once for all tiles. The same numbers are multiplied in the same order.
#pragma once
#include <algorithm>

#include "sinterlm/formats.h"

namespace sl {

constexpr int kStepLines = 4 * kPanelCols;        // bytes from a line of 16 columns to its next one
constexpr int kReadyCodeRows = 6;                 // 12 sums, one step of 16 columns, one operand
constexpr size_t kReadyBytes = size_t{16} << 10;  // half an L1

// The register tile over ready columns.
template <int Rows>
struct ReadyShape {
  static constexpr int kRows = Rows;
  static constexpr int cols(int) { return 1; }
};

// Lines of weights that are read after the ready ones, which lie `next` bytes further on, so that
// memory is read while the tiles compute: each tile over the rows asks for its share of them, some
// every turn.
class AheadByTurns {
 public:
  static constexpr int kTurn = 64;  // k

  // `lines` from `first` on were made ready, which are `depth` k; a tile's turn is `turn` of them.
  AheadByTurns(const void* first, int64_t next, int lines, int depth, int turn = kTurn)
      : line_(static_cast<const char*>(first) + next),
        left_(lines),
        turns_((depth + turn - 1) / turn) {}
  AheadByTurns share(int i, int tiles, int) const {
    AheadByTurns mine = *this;
    const int begin = left_ * i / tiles;
    mine.line_ += int64_t(begin) * kStepLines;
    mine.left_ = left_ * (i + 1) / tiles - begin;
    mine.each_ = (mine.left_ + turns_ - 1) / turns_;
    return mine;
  }
  SL_MEMBER void turn() {
    const int n = std::min(left_, each_);
    for (int i = 0; i < n; ++i) __builtin_prefetch(line_ + int64_t(i) * kStepLines, 0, 2);
    line_ += int64_t(n) * kStepLines;
    left_ -= n;
  }
  SL_MEMBER void ask(const void*) const {}

 private:
  const char* line_;
  int left_, turns_, each_ = 0;  // lines; in all, and of a share each turn
};

}  // namespace sl
