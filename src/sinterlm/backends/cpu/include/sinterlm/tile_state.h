// The state of the tile registers of AMX: whose permission a process must ask for, and which a
// worker configures for what it multiplies next and leaves empty at the end of a step.
#pragma once

#if defined(SL_ISA_AMX)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace sl {

#if defined(SL_ISA_AMX)

// Rows of the tiles 0, 1, 4 (upper) and 2, 3, 5 (lower), and elements of 32 bits along k of 4 and
// 5, which are the rows of 6 and 7. All columns are 16.
struct TileRows {
  int upper, lower, depth;
  bool operator==(const TileRows& o) const {
    return upper == o.upper && lower == o.lower && depth == o.depth;
  }
};

// Whether this process may use tiles: Linux grants them when asked (its Documentation/arch/x86/
// xstate.rst), and refuses where a thread has a signal stack too small for them.
inline bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Lives as long as a thread works for us. Tiles belong to whoever runs, as registers do that a call
// may change: what a host had in them is gone. Empty ones cost a context switch nothing.
class TileState {
 public:
  TileState() { shape() = {}; }
  ~TileState() { _tile_release(); }
  TileState(const TileState&) = delete;
  TileState& operator=(const TileState&) = delete;

  // Tiles of these shapes, empty where they had others.
  static void set(const TileRows& wanted) {
    if (shape() == wanted) return;
    struct alignas(64) {  // Intel's manual, volume 1, 18.3: palette 1
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int rows[8] = {wanted.upper, wanted.upper, wanted.lower, wanted.lower,
                         wanted.upper, wanted.lower, wanted.depth, wanted.depth};
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = static_cast<uint8_t>(rows[i]);
      config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? 4 * wanted.depth : 64);
    }
    asm volatile("" ::: "memory");
    _tile_loadconfig(&config);
    shape() = wanted;
  }

 private:
  static TileRows& shape() {
    static thread_local TileRows shape;
    return shape;
  }
};

#else

inline bool may_use_tiles() { return true; }
struct TileState {
  TileState() {}  // not trivial: no warning of a variable that nobody uses
};

#endif

}  // namespace sl
