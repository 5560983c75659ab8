// What is read next, in pieces that lie anywhere, asked for while something else is computed.
#pragma once
#include <cstdint>

#include "sinterlm/args.h"

namespace sl {

// Lines of keys and values that are read after a chunk. They are asked for a few at a time under
// its products and its softmax, so that memory is read all the while: asked for at once they would
// keep the products waiting, and nothing would be read under the rest.
class LinesAhead {
 public:
  static constexpr int kMost = 40;  // pieces

  void clear() { count_ = at_ = 0, line_ = stop_ = nullptr; }
  void add(const void* from, int64_t bytes) {
    if (count_ == kMost || bytes <= 0) return;
    pieces_[count_++] = {static_cast<const char*>(from), static_cast<const char*>(from) + bytes};
  }
  SL_MEMBER void ask(int lines) {
    for (; lines > 0; --lines) {
      if (line_ >= stop_) {
        if (at_ == count_) return;
        line_ = pieces_[at_].begin, stop_ = pieces_[at_++].end;
      }
      __builtin_prefetch(line_, 0, 2);
      line_ += 64;
    }
  }
  void ask_rest() {
    while (line_ < stop_ || at_ < count_) ask(1 << 10);
  }

 private:
  struct Piece {
    const char *begin, *end;
  };
  Piece pieces_[kMost];
  int count_ = 0, at_ = 0;
  const char *line_ = nullptr, *stop_ = nullptr;
};

// The same for register tiles: some with each step of the first one over the rows.
struct KeysAhead {
  static constexpr int kTurn = 1 << 30;
  LinesAhead* lines;
  int each = 2;
  int64_t next() const { return 0; }
  KeysAhead share(int i, int, int) const { return {lines, i == 0 ? each : 0}; }
  SL_MEMBER void turn() {}
  SL_MEMBER void ask(const void*) const { lines->ask(each); }
};

}  // namespace sl
