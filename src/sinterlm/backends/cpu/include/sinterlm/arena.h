// Zeroed, 2 MiB-aligned anonymous memory that asks for huge pages, and read-only file mappings.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace sl {

constexpr size_t kHugePage = size_t{2} << 20;

// Memory from mmap, given back by the destructor. Empty (null) when the system had none.
class Arena {
 public:
  Arena() = default;
  Arena(Arena&& other) noexcept { swap(other); }
  Arena& operator=(Arena&& other) noexcept {
    Arena old(std::move(other));
    swap(old);
    return *this;
  }
  ~Arena() {
    if (map_) munmap(map_, map_bytes_);
  }

  // `bytes` of zeros; pages come into being when first touched. Small arenas stay on small pages.
  static Arena zeroed(size_t bytes) {
    Arena a;
    if (bytes > SIZE_MAX - 2 * kHugePage) return a;
    const bool huge = bytes >= kHugePage / 2;
    const size_t align = huge ? kHugePage : 4096;
    const size_t size = (bytes + align - 1) / align * align + (huge ? kHugePage : 0);
    void* p = mmap(nullptr, size ? size : align, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return a;
    a.map_ = p;
    a.map_bytes_ = size ? size : align;
    const uintptr_t start = (reinterpret_cast<uintptr_t>(p) + align - 1) / align * align;
    a.data_ = reinterpret_cast<void*>(start);
    if (huge) madvise(a.data_, size - kHugePage, MADV_HUGEPAGE);  // a wish: failure is harmless
    return a;
  }

  // The first `bytes` of an open file, shared with every process that maps it.
  static Arena file(int fd, size_t bytes) {
    Arena a;
    void* p = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) return a;
    a.map_ = a.data_ = p;
    a.map_bytes_ = bytes;
    return a;
  }

  void* data() const { return data_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  void swap(Arena& other) {
    std::swap(map_, other.map_);
    std::swap(data_, other.data_);
    std::swap(map_bytes_, other.map_bytes_);
  }
  void* map_ = nullptr;
  void* data_ = nullptr;
  size_t map_bytes_ = 0;
};

}  // namespace sl
