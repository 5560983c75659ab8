// Memory interleaved over the NUMA nodes of the workers, by Linux's own calls.
//
// Any worker may claim any panel and any sequence's pages, so weights and KV lie on all nodes in
// turn, page by page, and every memory controller serves every worker. What a worker alone touches
// (its scratch) lands on its own node by first touch.
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#include "sinterlm/threads.h"

namespace sl {

class Nodes {
 public:
  static constexpr unsigned kMost = 1024;

  void add(unsigned node) {
    if (node < kMost) mask_[node / kBits] |= 1ul << node % kBits;
  }
  int count() const {
    int n = 0;
    for (unsigned long bits : mask_) n += __builtin_popcountl(bits);
    return n;
  }
  // Pages of [p, p + bytes) that are not there yet will lie on these nodes in turn. False where the
  // system does not do it; then they lie where they are first touched.
  bool interleave(void* p, size_t bytes) const {
    constexpr int kInterleave = 3;  // MPOL_INTERLEAVE
    return syscall(SYS_mbind, p, bytes, kInterleave, mask_, kMost + 1, 0) == 0;
  }
  // The nodes this process may have memory on.
  static Nodes allowed() {
    constexpr int kAllowed = 4;  // MPOL_F_MEMS_ALLOWED
    Nodes n;
    if (syscall(SYS_get_mempolicy, nullptr, n.mask_, kMost + 1, nullptr, kAllowed) != 0)
      n.mask_[0] = 1;
    return n;
  }
  // The nodes of workers that stay where they are.
  static Nodes of(Pool& pinned) {
    std::vector<unsigned> node(pinned.count(), 0);
    pinned.run([&](Worker& w) {
      unsigned cpu;
      syscall(SYS_getcpu, &cpu, &node[w.id], nullptr);
    });
    Nodes n;
    for (unsigned one : node) n.add(one);
    return n;
  }

 private:
  static constexpr unsigned kBits = 8 * sizeof(unsigned long);
  unsigned long mask_[kMost / kBits] = {};
};

}  // namespace sl
