// A GEMM library of no device: the entry points of hipBLASLt or cuBLASLt that the host uses, with
// the prototypes, structs and numbers of the vendors' public C interfaces, each handed to Python
// (recording_gemm.py). -DFAKE_HIP or -DFAKE_CUDA. Types of data, and what hipBLASLt
// shares with hipBLAS, are from the vendors' own headers.
#include <cstddef>
#include <cstdint>
#include <type_traits>

using Call = int (*)(const char* name, const uint64_t* words, int count);
static Call python = nullptr;
extern "C" __attribute__((visibility("default"))) void fake_gemm_use(Call call) { python = call; }

template <class T>
uint64_t word(T v) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<uint64_t>(v);
  } else {
    return static_cast<uint64_t>(v);
  }
}

template <class... A>
int ask(const char* name, A... a) {
  const uint64_t words[] = {word(a)...};
  return python ? python(name, words, sizeof...(a)) : 1;  // 1: not initialised
}

// What the vendors' documents say, as far as it is used.
#ifdef FAKE_HIP
#define __HIP_PLATFORM_AMD__
#include <hip/library_types.h>
#include <hipblas-common/hipblas-common.h>
#define NAME(rest) hipblasLt##rest
using Status = hipblasStatus_t;
constexpr Status ALLOC_FAILED = HIPBLAS_STATUS_ALLOC_FAILED;
constexpr Status NOT_SUPPORTED = HIPBLAS_STATUS_NOT_SUPPORTED;
using ComputeType = hipblasComputeType_t;
constexpr ComputeType COMPUTE_32F = HIPBLAS_COMPUTE_32F;
constexpr hipblasOperation_t OP_N = HIPBLAS_OP_N, OP_T = HIPBLAS_OP_T;
using DataType = hipDataType;
constexpr DataType R_32F = HIP_R_32F, R_16BF = HIP_R_16BF;
enum DescAttribute { DESC_TRANSA = 0, DESC_TRANSB = 1 };                // …MatmulDescAttributes_t
enum PreferenceAttribute { SEARCH_MODE = 0, MAX_WORKSPACE_BYTES = 1 };  // …PreferenceAttributes_t
using Handle = void*;
struct Algorithm {
  uint8_t data[16];
  size_t max_workspace_bytes;
};
#else
#include <library_types.h>
#define NAME(rest) cublasLt##rest
using DataType = cudaDataType;
constexpr DataType R_32F = CUDA_R_32F, R_16BF = CUDA_R_16BF;
enum Status { SUCCESS = 0, ALLOC_FAILED = 3, NOT_SUPPORTED = 15 };  // cublasStatus_t
enum ComputeType { COMPUTE_32F = 68 };                              // cublasComputeType_t
enum Operation { OP_N = 0, OP_T = 1 };                              // cublasOperation_t
enum DescAttribute { DESC_TRANSA = 3, DESC_TRANSB = 4 };            // …MatmulDescAttributes_t
enum PreferenceAttribute { MAX_WORKSPACE_BYTES = 1, MIN_ALIGNMENT_B_BYTES = 6 };
using Handle = struct Context*;
struct Algorithm {
  uint64_t data[8];
};
#endif
using Desc = struct OpaqueDesc*;
using Layout = struct OpaqueLayout*;
using Preference = struct OpaquePreference*;
using Stream = struct OpaqueStream*;
struct Heuristic {  // …MatmulHeuristicResult_t
  Algorithm algo;
  size_t workspaceSize;
  Status state;
  float wavesCount;
  int reserved[4];
};

#define EXPORT extern "C" __attribute__((visibility("default")))
#define DEFINE(rest, args, name, ...) \
  EXPORT Status NAME(rest) args { return static_cast<Status>(ask(name, __VA_ARGS__)); }

DEFINE(Create, (Handle * to), "create", to)
DEFINE(Destroy, (Handle h), "destroy", h)
DEFINE(MatmulDescCreate, (Desc * to, ComputeType c, DataType scale), "desc_create", to, c, scale)
DEFINE(MatmulDescSetAttribute, (Desc d, DescAttribute a, const void* from, size_t n), "desc_set", d,
       a, from, n)
DEFINE(MatmulDescDestroy, (Desc d), "desc_destroy", d)
DEFINE(MatrixLayoutCreate, (Layout * to, DataType t, uint64_t rows, uint64_t cols, int64_t ld),
       "layout_create", to, t, rows, cols, ld)
DEFINE(MatrixLayoutDestroy, (Layout l), "layout_destroy", l)
DEFINE(MatmulPreferenceCreate, (Preference * to), "preference_create", to)
DEFINE(MatmulPreferenceSetAttribute,
       (Preference p, PreferenceAttribute a, const void* from, size_t n), "preference_set", p, a,
       from, n)
DEFINE(MatmulPreferenceDestroy, (Preference p), "preference_destroy", p)
DEFINE(MatmulAlgoGetHeuristic,
       (Handle h, Desc d, Layout a, Layout b, Layout c, Layout out, Preference p, int asked,
        Heuristic to[], int* found),
       "heuristic", h, d, a, b, c, out, p, asked, to, found)
DEFINE(Matmul,
       (Handle h, Desc d, const void* alpha, const void* a, Layout at, const void* b, Layout bt,
        const void* beta, const void* c, Layout ct, void* out, Layout dt, const Algorithm* algo,
        void* workspace, size_t bytes, Stream s),
       "matmul", h, d, alpha, a, at, b, bt, beta, c, ct, out, dt, algo, workspace, bytes, s)

// The host's idea of all this against it.
#include "vendor_gemm.h"

template <class F>
struct List;
template <class R, class... A>
struct List<R(A...)> {
  static constexpr bool ok = sizeof(R) == 4 && (!std::is_floating_point_v<A> && ...);
  static constexpr int count = sizeof...(A);
  static constexpr size_t sizes[] = {sizeof(A)...};
  static constexpr bool pointers[] = {std::is_pointer_v<A>...};
};
template <class Ours, class Theirs>
constexpr bool same_shape() {
  if (!List<Theirs>::ok || List<Ours>::count != List<Theirs>::count) return false;
  for (int i = 0; i < List<Ours>::count; ++i)
    if (List<Ours>::sizes[i] != List<Theirs>::sizes[i] ||
        List<Ours>::pointers[i] != List<Theirs>::pointers[i])
      return false;
  return true;
}
#ifdef FAKE_HIP
#define VENDOR(hip, cuda) hip
#else
#define VENDOR(hip, cuda) cuda
#endif
#define CHECK(field, hip, cuda, args)                                \
  static_assert(same_shape<int args, decltype(VENDOR(hip, cuda))>(), \
                #field " has another prototype");
SL_GEMM_CALLS(CHECK)
#undef CHECK
using Answer = VENDOR(slg::HipAnswer, slg::CudaAnswer);
constexpr slg::GemmNumbers kNumbers = VENDOR(slg::kHipGemm, slg::kCudaGemm);
static_assert(sizeof(Answer) == sizeof(Heuristic));
static_assert(offsetof(Answer, workspace) == offsetof(Heuristic, workspaceSize));
static_assert(offsetof(Answer, state) == offsetof(Heuristic, state));
static_assert(offsetof(Answer, workspace) == sizeof(Algorithm));
static_assert(kNumbers.compute_fp32 == COMPUTE_32F && kNumbers.op_n == OP_N);
static_assert(kNumbers.op_t == OP_T && kNumbers.transpose_a == DESC_TRANSA);
static_assert(kNumbers.transpose_b == DESC_TRANSB && slg::kMostWorkspace == MAX_WORKSPACE_BYTES);
static_assert(slg::kFp32 == R_32F && slg::kBf16 == R_16BF);
static_assert(kNumbers.no_memory == ALLOC_FAILED && kNumbers.not_supported == NOT_SUPPORTED);
#ifdef FAKE_CUDA
static_assert(slg::kAlignmentB == MIN_ALIGNMENT_B_BYTES);
#endif
