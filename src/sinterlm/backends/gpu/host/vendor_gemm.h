// The vendor's GEMM library: hipBLASLt or cuBLASLt, opened when a table asks for it, so that
// nothing of either is needed to build or to load this library. Handle, descriptors, layouts and
// algorithms are made when a model is opened: a step makes one call, which a graph may hold.
#pragma once
#include <map>
#include <utility>

#include "driver.h"
#include "table.h"

namespace slg {

// field, hipBLASLt's name, cuBLASLt's name, arguments. Handles, descriptors, layouts, preferences,
// algorithms and streams are void*, enumerations int; every call returns 0 or a code.
#define SL_GEMM_CALLS(X)                                                                          \
  X(create, hipblasLtCreate, cublasLtCreate, (void**))                                            \
  X(destroy, hipblasLtDestroy, cublasLtDestroy, (void*))                                          \
  X(desc_create, hipblasLtMatmulDescCreate, cublasLtMatmulDescCreate, (void**, int, int))         \
  X(desc_set, hipblasLtMatmulDescSetAttribute, cublasLtMatmulDescSetAttribute,                    \
    (void*, int, const void*, size_t))                                                            \
  X(desc_destroy, hipblasLtMatmulDescDestroy, cublasLtMatmulDescDestroy, (void*))                 \
  X(layout_create, hipblasLtMatrixLayoutCreate, cublasLtMatrixLayoutCreate,                       \
    (void**, int, uint64_t, uint64_t, int64_t))                                                   \
  X(layout_destroy, hipblasLtMatrixLayoutDestroy, cublasLtMatrixLayoutDestroy, (void*))           \
  X(preference_create, hipblasLtMatmulPreferenceCreate, cublasLtMatmulPreferenceCreate, (void**)) \
  X(preference_set, hipblasLtMatmulPreferenceSetAttribute, cublasLtMatmulPreferenceSetAttribute,  \
    (void*, int, const void*, size_t))                                                            \
  X(preference_destroy, hipblasLtMatmulPreferenceDestroy, cublasLtMatmulPreferenceDestroy,        \
    (void*))                                                                                      \
  X(heuristic, hipblasLtMatmulAlgoGetHeuristic, cublasLtMatmulAlgoGetHeuristic,                   \
    (void*, void*, void*, void*, void*, void*, void*, int, void*, int*))                          \
  X(matmul, hipblasLtMatmul, cublasLtMatmul,                                                      \
    (void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, \
     void*, void*, void*, const void*, void*, size_t, void*))

// What a heuristic answers, by vendor: an algorithm, and what it needs.
struct HipAnswer {
  uint8_t algorithm[16];
  size_t most_workspace;  // of the algorithm
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
struct CudaAnswer {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

// Numbers of the vendors' enumerations; the last two are what a call answers.
struct GemmNumbers {
  int compute_fp32, op_n, op_t, transpose_a, transpose_b, no_memory, not_supported;
};
constexpr GemmNumbers kHipGemm{2, 111, 112, 0, 1, 2, 7}, kCudaGemm{68, 0, 1, 3, 4, 3, 15};
constexpr int kFp32 = 0, kBf16 = 14;  // data types, of both
constexpr int kMostWorkspace = 1;     // attribute of a preference, of both
constexpr int kAlignmentB = 6;        // attribute of a preference, of CUDA's
constexpr uint32_t kInputAlign = 64;  // bytes, of activations; all else is aligned to 256

class VendorGemm {
 public:
  VendorGemm() = default;
  VendorGemm(const VendorGemm&) = delete;
  VendorGemm& operator=(const VendorGemm&) = delete;
  ~VendorGemm() {
    for (void* layout : layouts_) layout_destroy(layout);
    if (desc_) desc_destroy(desc_);
    if (handle_) destroy(handle_);
  }

#define SL_FIELD(field, hip, cuda, args) int(*field) args = nullptr;
  SL_GEMM_CALLS(SL_FIELD)
#undef SL_FIELD

  // Opens the library, and chooses an algorithm for each product of the table at each number of
  // rows up to `most_rows`. Nothing where no step has enough rows. The device must be current.
  sl_status open(const Table& t, bool is_hip, int most_rows) {
    if (!t.facts.count("vendor_least_rows") || most_rows < t.fact("vendor_least_rows"))
      return SL_OK;
    hip_ = is_hip;
    step_ = t.fact("vendor_rows_step");
    most_rows_ = most_rows;
    for (const Buffer& b : t.buffers)
      if (b.name == "vendor_workspace") workspace_bytes_ = static_cast<size_t>(b.bytes);
    SL_TRY(load(t.fact("vendor_least_rows")));
    SL_TRY(check(create(&handle_), "opening it"));
    const GemmNumbers& n = numbers();
    SL_TRY(check(desc_create(&desc_, n.compute_fp32, kFp32), "describing a product"));
    const int32_t op_t = n.op_t, op_n = n.op_n;
    SL_TRY(check(desc_set(desc_, n.transpose_a, &op_t, sizeof op_t), "describing a product"));
    SL_TRY(check(desc_set(desc_, n.transpose_b, &op_n, sizeof op_n), "describing a product"));
    for (size_t i = 0; i < t.kernels.size(); ++i)
      if (t.kernels[i].is_vendor()) SL_TRY(plan_product(t, static_cast<int>(i)));
    return SL_OK;
  }

  bool is_open() const { return handle_ != nullptr; }
  const char* name() const { return hip_ ? "hipBLASLt" : "cuBLASLt"; }
  std::string description() const {
    return is_open() ? name() + (" (" + library_.path()) + ")" : std::string();
  }

  // The rows that are multiplied for `rows` of a step: whole units, but no more than buffers have.
  int rows_of(int rows) const { return std::min((rows + step_ - 1) / step_ * step_, most_rows_); }
  int rows_step() const { return step_; }
  int most_rows() const { return most_rows_; }

  // sums[rows, N] = a[rows, K] @ w[N, W_PITCH]ᵀ, `rows` rounded up; neither waits nor allocates.
  sl_status multiply(int kernel, int rows, const void* a, const void* w, void* sums,
                     void* workspace, void* stream) const {
    const auto found = plans_.find({kernel, rows_of(rows)});
    if (found == plans_.end())
      return fail(SL_INTERNAL, "no algorithm of %s for %d rows", name(), rows);
    const Plan& p = found->second;
    const float one = 1, zero = 0;
#ifdef SL_MUTATE_GEMM_STREAM
    stream = nullptr;
#endif
#ifdef SL_MUTATE_GEMM_SWAPPED
    std::swap(a, w);
#endif
    size_t workspace_bytes = workspace_bytes_;
#ifdef SL_MUTATE_GEMM_WORKSPACE
    workspace_bytes *= 2;
#endif
#ifdef SL_MUTATE_GEMM_LATE
    void* late = nullptr;
    layout_create(&late, kFp32, 1, 1, 1);
    layout_destroy(late);
#endif
    // The library's matrices are columns: W[N, K] in rows is its transpose, and so are the sums.
    return check(matmul(handle_, desc_, &one, w, p.w, a, p.a, &zero, sums, p.sums, sums, p.sums,
                        p.algorithm, workspace, workspace_bytes, stream),
                 "multiplying");
  }

 private:
  struct Plan {
    void *w, *a, *sums;  // layouts
    uint64_t algorithm[8];
  };

  const GemmNumbers& numbers() const { return hip_ ? kHipGemm : kCudaGemm; }

  sl_status load(int least_rows) {
    static const char* const hip_names[] = {"libhipblaslt.so", "libhipblaslt.so.1",
                                            "libhipblaslt.so.0", nullptr};
    static const char* const cuda_names[] = {"libcublasLt.so.13", "libcublasLt.so.12",
                                             "libcublasLt.so", nullptr};
    if (!library_.open(std::getenv("SINTERLM_VENDOR_GEMM"), hip_ ? hip_names : cuda_names))
      return fail(SL_MISMATCH,
                  "this bundle multiplies steps of %d tokens and more by %s, which is not here: "
                  "%s; install it (%s), name it with SINTERLM_VENDOR_GEMM, or compile the model "
                  "again without --vendor-gemm",
                  least_rows, name(), library_.why().c_str(),
                  hip_ ? "hipblaslt of ROCm" : "libcublas of CUDA 12 or 13");
#define SL_BIND(field, hip, cuda, args) SL_TRY(find(&field, hip_ ? #hip : #cuda));
    SL_GEMM_CALLS(SL_BIND)
#undef SL_BIND
    return SL_OK;
  }

  sl_status find(void* field, const char* symbol) const {
    if (library_.find(field, symbol)) return SL_OK;
    return fail(SL_MISMATCH,
                "%s has no %s: install a newer %s, or compile the model again without "
                "--vendor-gemm",
                library_.path().c_str(), symbol, name());
  }

  sl_status check(int code, const char* doing) const {
    if (code == 0) return SL_OK;
    return fail(code == numbers().no_memory ? SL_NO_MEMORY : SL_INTERNAL,
                "%s of %s: error %d while %s; compile the model again without --vendor-gemm to do "
                "without it",
                name(), library_.path().c_str(), code, doing);
  }

  sl_status layout(int type, int64_t rows, int64_t columns, int64_t pitch, void** out) {
    SL_TRY(check(layout_create(out, type, rows, columns, pitch), "describing a matrix"));
    layouts_.push_back(*out);
    return SL_OK;
  }

  // Every number of rows that steps have, for one kernel of the table.
  sl_status plan_product(const Table& t, int kernel) {
    const Kernel& k = t.kernels[kernel];
    int64_t pitch = k.pitch;
#ifdef SL_MUTATE_GEMM_PITCH
    pitch += 64;
#endif
    void* w = nullptr;
    SL_TRY(layout(kBf16, k.K, k.N, pitch, &w));
    for (int rows = rows_of(t.fact("vendor_least_rows"));; rows = rows_of(rows + 1)) {
      Plan p{w, nullptr, nullptr, {}};
      SL_TRY(layout(kBf16, k.K, rows, k.K, &p.a));
      SL_TRY(layout(kFp32, k.N, rows, k.N, &p.sums));
      SL_TRY(choose(k, rows, &p));
      plans_.emplace(std::make_pair(kernel, rows), p);
      if (rows == most_rows_) return SL_OK;
    }
  }

  sl_status choose(const Kernel& k, int rows, Plan* p) const {
    void* preference = nullptr;
    SL_TRY(check(preference_create(&preference), "choosing an algorithm"));
    union {
      HipAnswer hip;
      CudaAnswer cuda;
    } answer{};
    const uint64_t most = workspace_bytes_;
    int found = 0;
    int code = preference_set(preference, kMostWorkspace, &most, sizeof most);
    if (code == 0 && !hip_)
      code = preference_set(preference, kAlignmentB, &kInputAlign, sizeof kInputAlign);
    if (code == 0)
      code =
          heuristic(handle_, desc_, p->w, p->a, p->sums, p->sums, preference, 1, &answer, &found);
    preference_destroy(preference);
    if (code != numbers().not_supported) SL_TRY(check(code, "choosing an algorithm"));
    const int state = hip_ ? answer.hip.state : answer.cuda.state;
    const size_t needed = hip_ ? answer.hip.workspace : answer.cuda.workspace;
    if (code != 0 || found < 1 || state != 0 || needed > workspace_bytes_)
      return fail(SL_MISMATCH,
                  "%s has no algorithm for %d rows of %d times %d columns in bf16 with sums in "
                  "fp32; compile the model again without --vendor-gemm",
                  name(), rows, k.K, k.N);
    static_assert(sizeof(HipAnswer::algorithm) + sizeof(size_t) <= sizeof p->algorithm, "");
    std::memcpy(p->algorithm, &answer, hip_ ? offsetof(HipAnswer, workspace) : sizeof p->algorithm);
    return SL_OK;
  }

  bool hip_ = true;
  int step_ = 1, most_rows_ = 0;
  size_t workspace_bytes_ = 0;
  SharedLibrary library_;
  void *handle_ = nullptr, *desc_ = nullptr;
  std::vector<void*> layouts_;
  std::map<std::pair<int, int>, Plan> plans_;  // by kernel and rows
};

}  // namespace slg
