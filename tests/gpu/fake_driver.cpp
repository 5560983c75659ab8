// A driver of no device: the entry points that the host of GPU libraries uses, with the vendors'
// own prototypes, each handed to Python (recording.py), which keeps memory, streams and graphs, and
// checks what it is asked. -DFAKE_HIP or -DFAKE_CUDA.
#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef FAKE_HIP
#define __HIP_PLATFORM_AMD__
#define __HIP_DISABLE_CPP_FUNCTIONS__
#include <hip/hip_runtime_api.h>
#define VENDOR(hip, cuda) hip
#else
#include <cuda.h>
// Newer headers rename this one; drivers have both, with one prototype.
#undef cuEventElapsedTime
extern "C" decltype(cuEventElapsedTime_v2) cuEventElapsedTime;
#define VENDOR(hip, cuda) cuda
#endif

// Every call in numbers: a name, up to eleven words, and the place of a result.
using Call = int (*)(const char* name, const uint64_t* words, int count);
static Call python = nullptr;
extern "C" __attribute__((visibility("default"))) void fake_driver_use(Call call) { python = call; }

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
  return python ? python(name, words, sizeof...(a)) : 3;  // 3: not initialised
}

#include "driver.h"

// The host's idea of an argument list against the vendor's prototype: as many arguments, each of
// the same size, none of them a float.
template <class F>
struct List;
template <class R, class... A>
struct List<R(A...)> {
  static constexpr bool ok = sizeof(R) == 4 && (!std::is_floating_point_v<A> && ...);
  static constexpr int count = sizeof...(A);
  static constexpr size_t sizes[] = {sizeof(A)...};
};
template <class Ours, class Theirs>
constexpr bool same_shape() {
  if (!List<Theirs>::ok || List<Ours>::count != List<Theirs>::count) return false;
  for (int i = 0; i < List<Ours>::count; ++i)
    if (List<Ours>::sizes[i] != List<Theirs>::sizes[i]) return false;
  return true;
}
#define CHECK(field, hip, cuda, args)                                                        \
  static_assert(same_shape<int args, std::remove_pointer_t<decltype(&VENDOR(hip, cuda))>>(), \
                #field " has another prototype");
SL_DRIVER_CALLS(CHECK)
#undef CHECK
#define CHECK(field, name, args) \
  static_assert(same_shape<int args, std::remove_pointer_t<decltype(&name)>>(), #field);
#ifdef FAKE_HIP
SL_HIP_CALLS(CHECK)
#else
SL_CUDA_CALLS(CHECK)
static_assert(slg::kMaxDynamicShared == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
#endif
static_assert(slg::kOutOfMemory == VENDOR(hipErrorOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY));
static_assert(slg::kInvalidImage == VENDOR(hipErrorInvalidImage, CUDA_ERROR_INVALID_IMAGE));
static_assert(slg::kNoBinaryForGpu == VENDOR(hipErrorNoBinaryForGpu, CUDA_ERROR_NO_BINARY_FOR_GPU));
static_assert(slg::kNonBlocking == VENDOR(hipStreamNonBlocking, CU_STREAM_NON_BLOCKING));
static_assert(slg::kThreadLocal ==
              VENDOR(hipStreamCaptureModeThreadLocal, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));

// The definitions: any that is no overload of the vendor's declaration is an error at link time of
// the host, and any with another type an error here.
#ifdef FAKE_HIP
using R = hipError_t;
using Stream = hipStream_t;
using Device = hipDeviceptr_t;
using Module = hipModule_t;
using Function = hipFunction_t;
using Graph = hipGraph_t;
using Exec = hipGraphExec_t;
using Event = hipEvent_t;
using Mode = hipStreamCaptureMode;
using Status = hipStreamCaptureStatus;
using Code = hipError_t;
using Allocated = void**;
using Freed = void*;
#else
using R = CUresult;
using Stream = CUstream;
using Device = CUdeviceptr;
using Module = CUmodule;
using Function = CUfunction;
using Graph = CUgraph;
using Exec = CUgraphExec;
using Event = CUevent;
using Mode = CUstreamCaptureMode;
using Status = CUstreamCaptureStatus;
using Code = CUresult;
using Allocated = CUdeviceptr*;
using Freed = CUdeviceptr;
#endif
#define DEFINE(hip, cuda, parameters, name, ...) \
  R VENDOR(hip, cuda) parameters { return static_cast<R>(ask(name, ##__VA_ARGS__)); }

extern "C" {
DEFINE(hipInit, cuInit, (unsigned flags), "init", flags)
DEFINE(hipGetDeviceCount, cuDeviceGetCount, (int* n), "device_count", n)
DEFINE(hipDeviceGetName, cuDeviceGetName, (char* to, int n, int d), "device_name", to, n, d)
DEFINE(hipDriverGetVersion, cuDriverGetVersion, (int* to), "driver_version", to)
DEFINE(hipMemGetInfo, cuMemGetInfo_v2, (size_t* free, size_t* all), "memory", free, all)
DEFINE(hipMalloc, cuMemAlloc_v2, (Allocated to, size_t n), "allocate", to, n)
DEFINE(hipFree, cuMemFree_v2, (Freed p), "release", p)
DEFINE(hipHostMalloc, cuMemHostAlloc, (void** to, size_t n, unsigned f), "host_allocate", to, n, f)
DEFINE(hipHostFree, cuMemFreeHost, (void* p), "host_release", p)
DEFINE(hipMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, (Device to, const void* from, size_t n, Stream s),
       "to_device", to, from, n, s)
DEFINE(hipMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, (void* to, Device from, size_t n, Stream s),
       "to_host", to, from, n, s)
DEFINE(hipMemsetD8Async, cuMemsetD8Async, (Device to, unsigned char v, size_t n, Stream s), "fill",
       to, v, n, s)
DEFINE(hipStreamCreateWithFlags, cuStreamCreate, (Stream * to, unsigned f), "stream_create", to, f)
DEFINE(hipStreamDestroy, cuStreamDestroy_v2, (Stream s), "stream_destroy", s)
DEFINE(hipStreamSynchronize, cuStreamSynchronize, (Stream s), "stream_wait", s)
DEFINE(hipStreamIsCapturing, cuStreamIsCapturing, (Stream s, Status* to), "is_capturing", s, to)
DEFINE(hipStreamBeginCapture, cuStreamBeginCapture_v2, (Stream s, Mode m), "capture_begin", s, m)
DEFINE(hipStreamEndCapture, cuStreamEndCapture, (Stream s, Graph* to), "capture_end", s, to)
DEFINE(hipGraphInstantiateWithFlags, cuGraphInstantiateWithFlags,
       (Exec * to, Graph g, unsigned long long f), "graph_make", to, g, f)
DEFINE(hipGraphLaunch, cuGraphLaunch, (Exec g, Stream s), "graph_launch", g, s)
DEFINE(hipGraphExecDestroy, cuGraphExecDestroy, (Exec g), "graph_release", g)
DEFINE(hipGraphDestroy, cuGraphDestroy, (Graph g), "captured_release", g)
DEFINE(hipEventCreateWithFlags, cuEventCreate, (Event * to, unsigned f), "event_create", to, f)
DEFINE(hipEventRecord, cuEventRecord, (Event e, Stream s), "event_record", e, s)
DEFINE(hipEventElapsedTime, cuEventElapsedTime, (float* to, Event a, Event b), "event_elapsed", to,
       a, b)
DEFINE(hipEventDestroy, cuEventDestroy_v2, (Event e), "event_release", e)
DEFINE(hipModuleLoadData, cuModuleLoadData, (Module * to, const void* image), "module_load", to,
       image)
DEFINE(hipModuleUnload, cuModuleUnload, (Module m), "module_unload", m)
DEFINE(hipModuleGetFunction, cuModuleGetFunction, (Function * to, Module m, const char* name),
       "function", to, m, name)
DEFINE(hipModuleLaunchKernel, cuLaunchKernel,
       (Function f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
        unsigned shared, Stream s, void** params, void** extra),
       "launch", f, gx, gy, gz, bx, by, bz, shared, s, params, extra)
DEFINE(hipDrvGetErrorString, cuGetErrorString, (Code code, const char** to), "error_text",
       static_cast<int>(code), to)
#ifdef FAKE_HIP
R hipSetDevice(int d) { return static_cast<R>(ask("set_device", d)); }
#else
R cuDevicePrimaryCtxRetain(CUcontext* to, CUdevice d) { return R(ask("context", to, d)); }
R cuCtxSetCurrent(CUcontext c) { return R(ask("set_context", c)); }
R cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  return R(ask("set_attribute", f, static_cast<int>(a), v));
}
#endif
}
