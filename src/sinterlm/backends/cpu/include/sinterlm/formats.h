// The formats of a GEMM's operands, as types: how rows of activations and panels of weights are
// stored. ir/quant.py has the same nouns, ir/plan.py the layout of panels.
//
//   Wide<E>        both in E
//   Coded<...>     codes of 8 or 4 bits against int8 activations: integer dot products
//   WeightOnly<..> codes against activations in E
//
// A format says of activations: kUnit, the columns that whoever writes a row must finish together;
// row_bytes(K); store(row, K, n, v), which stores columns [n, n + kUnit) from fp32. And of weights:
// Weight, what a pointer to panels points at; panel_bytes(K).
#pragma once
#include "sinterlm/dots.h"

namespace sl {

constexpr int kPanelCols = 64;

template <class E>
struct Wide {
  using Weight = E;
  static constexpr int kUnit = kLanes;
  static constexpr int64_t row_bytes(int K) { return int64_t(K) * sizeof(E); }
  static constexpr int64_t panel_bytes(int K) { return int64_t(K) * kPanelCols * sizeof(E); }
  static void store(char* row, int, int n, const float* v) {
    store_elems(reinterpret_cast<E*>(row) + n, load(v));
  }
};

// Panels of codes: Group weights along k share a scale (0 = all of K) and, with Offsets, an offset.
template <int Bits, int Group, bool Offsets>
struct Codes {
  using Weight = uint8_t;
  using Scale = std::conditional_t<Group == 0, float, fp16>;
  static constexpr int kBits = Bits, kGroup = Group;
  static constexpr bool kOffsets = Offsets;
  static constexpr int kStep = 32 / Bits;            // k per step: 4 bytes of a column
  static constexpr int kStepBytes = 4 * kPanelCols;  // all columns of a panel
  static constexpr int kCentre = 1 << (Bits - 1);    // the code of zero without offsets
  static constexpr int kScaleBytes = kPanelCols * sizeof(Scale);
  static constexpr int kTailBytes = kScaleBytes + (Offsets ? kPanelCols * 4 : 0);

  static constexpr int64_t code_bytes(int k) { return int64_t(k) / kStep * kStepBytes; }
  static constexpr int64_t panel_bytes(int K) {
    return code_bytes(K) + int64_t(Group == 0 ? 1 : (K + Group - 1) / Group) * kTailBytes;
  }
  // The codes of depth k, which begins a group or is anywhere where all of K is one.
  static const uint8_t* codes_at(const uint8_t* panel, int k) {
    return panel + code_bytes(k) + int64_t(Group == 0 ? 0 : k / Group) * kTailBytes;
  }
  static int group_end(int K, int k) {
    return Group == 0 ? K : std::min(K, k / Group * Group + Group);
  }
  // Scales, then offsets, of the group whose codes lie at `codes` and which ends `left` k later.
  static const uint8_t* tail(const uint8_t* codes, int left) { return codes + code_bytes(left); }
  static Vec scales(const uint8_t* tail, int col) {
    return load_elems(reinterpret_cast<const Scale*>(tail) + col);
  }
  static Vec offsets(const uint8_t* tail, int col) {
    return load(reinterpret_cast<const float*>(tail + kScaleBytes) + col);
  }
  // Weight (column, k) of a panel in fp32.
  static float at(const uint8_t* panel, int K, int column, int k) {
    const int first = Group == 0 ? 0 : k / Group * Group, in = k - first;
    const uint8_t* codes = codes_at(panel, first);
    const uint8_t* end = tail(codes, group_end(K, first) - first);
    const uint8_t byte = codes[code_bytes(in / kStep * kStep) + column * 4 + in % 4];
    const int code = Bits == 8 ? byte : byte >> (in % kStep / 4 * 4) & 15;
    const float scale = to_float(reinterpret_cast<const Scale*>(end)[column]);
    if (!Offsets) return scale * static_cast<float>(code - kCentre);
    return scale * static_cast<float>(code) +
           reinterpret_cast<const float*>(end + kScaleBytes)[column];
  }
};

// How a group of numbers becomes int8 codes that stand for code * scale: scale = amax / 127. A
// group whose amax is below kSmallest is stored as zeros; NaN or infinity in it makes its scale
// NaN, and so whatever is computed from it.
struct GroupScale {
  static constexpr float kSmallest = 0x1p-100f;
  float scale, inverse;  // inverse 0: every code is 0

  template <int N>
  static GroupScale of(const float* v) {
    Vec top = zero(), bad = zero();
    for (int i = 0; i < N; i += kLanes) {
      const Vec x = load(v + i);
      top = max(top, max(x, sub(zero(), x)));
      bad = fma(x, zero(), bad);
    }
    const float amax = reduce_max(top);
    if (reduce_add(bad) != 0) return {__builtin_nanf(""), 0.0f};
    if (amax < kSmallest) return {0.0f, 0.0f};
    return {amax / 127.0f, 127.0f / amax};
  }
  // Codes of 16 numbers of the group, as floats.
  Vec codes(const float* v) const {
    return inverse > 0 ? round_nearest(mul(load(v), set1(inverse))) : zero();
  }
};

// Activations as int8 codes: ActGroup of a row share a scale. A row is
// codes [K] | scales fp32 [K / ActGroup] | sums of codes int32 [K / kBlock].
template <int Bits, int Group, bool Offsets, int ActGroup>
struct Coded : Codes<Bits, Group, Offsets> {
  using Act = typename Dot<Bits>::Act;
  static constexpr int kUnit = ActGroup;
  static constexpr int kBlock = Group == 0 ? ActGroup : std::min(Group, ActGroup);

  static constexpr int64_t scales_at(int K) { return int64_t(K) * sizeof(Act); }
  static constexpr int64_t sums_at(int K) { return scales_at(K) + int64_t(K) / ActGroup * 4; }
  static constexpr int64_t row_bytes(int K) { return sums_at(K) + int64_t(K) / kBlock * 4; }

  // One group.
  static void store(char* row, int K, int n, const float* v) {
    const GroupScale group = GroupScale::of<ActGroup>(v);
    Act* codes = reinterpret_cast<Act*>(row) + n;
    int32_t* sums = reinterpret_cast<int32_t*>(row + sums_at(K)) + n / kBlock;
    for (int b = 0; b < ActGroup; b += kBlock) {
      Vec sum = zero();
      for (int i = b; i < b + kBlock; i += kLanes) {
        const Vec code = group.codes(v + i);
        store_codes(codes + i, code);
        sum = add(sum, code);
      }
      sums[b / kBlock] = static_cast<int32_t>(reduce_add(sum));
    }
    reinterpret_cast<float*>(row + scales_at(K))[n / ActGroup] = group.scale;
  }
};

// Codes against activations in E: panels are turned into E a few k at a time.
template <class E, int Bits, int Group, bool Offsets>
struct WeightOnly : Codes<Bits, Group, Offsets> {
  using Element = E;
  static constexpr int kUnit = Wide<E>::kUnit;
  static constexpr int64_t row_bytes(int K) { return Wide<E>::row_bytes(K); }
  static void store(char* row, int K, int n, const float* v) { Wide<E>::store(row, K, n, v); }
};

// Columns [n, n + 16) of row `id` of an embedding table [V][H], as fp32; zeros from H on. Codes are
// always in panels.
template <class F>
struct Table {
  SL_INLINE Vec load(const uint8_t* panels, bool, int id, int n, int H, int K) {
    const uint8_t* panel = panels + id / kPanelCols * F::panel_bytes(K);
    float v[kLanes];
    for (int i = 0; i < kLanes; ++i)
      v[i] = n + i < H ? F::at(panel, K, id % kPanelCols, n + i) : 0.0f;
    return sl::load(v);
  }
};
template <class E>
struct Table<Wide<E>> {
  SL_INLINE Vec load(const E* table, bool is_panels, int id, int n, int, int K) {
    constexpr int P = kPair<E>;
    if (!is_panels) return load_elems(table + int64_t(id) * K + n);
    const E* lane = table + int64_t(id / kPanelCols) * kPanelCols * K + id % kPanelCols * P;
    float v[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int k = n + i;
      v[i] = to_float(lane[int64_t(k / P) * kPanelCols * P + k % P]);
    }
    return sl::load(v);
  }
};

}  // namespace sl
