// The driver of a GPU: HIP's or CUDA's, opened when a model is, so that nothing of either is needed
// to build or to load this library. One list of the calls that are used; both vendors' have the
// same arguments but for a few, which stand apart.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <string>

#include "shared_library.h"
#include "sinterlm/error.h"

namespace slg {

using sl::fail;

// field, HIP's name, CUDA's name, arguments. Streams, modules, functions and graphs are void*, as
// is memory of the device; every call returns 0 or a code whose meaning both vendors share.
#define SL_DRIVER_CALLS(X)                                                                       \
  X(init, hipInit, cuInit, (unsigned))                                                           \
  X(device_count, hipGetDeviceCount, cuDeviceGetCount, (int*))                                   \
  X(device_name, hipDeviceGetName, cuDeviceGetName, (char*, int, int))                           \
  X(driver_version, hipDriverGetVersion, cuDriverGetVersion, (int*))                             \
  X(memory, hipMemGetInfo, cuMemGetInfo_v2, (size_t*, size_t*))                                  \
  X(allocate, hipMalloc, cuMemAlloc_v2, (void**, size_t))                                        \
  X(release, hipFree, cuMemFree_v2, (void*))                                                     \
  X(host_allocate, hipHostMalloc, cuMemHostAlloc, (void**, size_t, unsigned))                    \
  X(host_release, hipHostFree, cuMemFreeHost, (void*))                                           \
  X(to_device, hipMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, (void*, const void*, size_t, void*))    \
  X(to_host, hipMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, (void*, void*, size_t, void*))            \
  X(fill, hipMemsetD8Async, cuMemsetD8Async, (void*, unsigned char, size_t, void*))              \
  X(stream_create, hipStreamCreateWithFlags, cuStreamCreate, (void**, unsigned))                 \
  X(stream_destroy, hipStreamDestroy, cuStreamDestroy_v2, (void*))                               \
  X(stream_wait, hipStreamSynchronize, cuStreamSynchronize, (void*))                             \
  X(is_capturing, hipStreamIsCapturing, cuStreamIsCapturing, (void*, int*))                      \
  X(capture_begin, hipStreamBeginCapture, cuStreamBeginCapture_v2, (void*, int))                 \
  X(capture_end, hipStreamEndCapture, cuStreamEndCapture, (void*, void**))                       \
  X(graph_make, hipGraphInstantiateWithFlags, cuGraphInstantiateWithFlags,                       \
    (void**, void*, unsigned long long))                                                         \
  X(graph_launch, hipGraphLaunch, cuGraphLaunch, (void*, void*))                                 \
  X(graph_release, hipGraphExecDestroy, cuGraphExecDestroy, (void*))                             \
  X(captured_release, hipGraphDestroy, cuGraphDestroy, (void*))                                  \
  X(event_create, hipEventCreateWithFlags, cuEventCreate, (void**, unsigned))                    \
  X(event_record, hipEventRecord, cuEventRecord, (void*, void*))                                 \
  X(event_elapsed, hipEventElapsedTime, cuEventElapsedTime, (float*, void*, void*))              \
  X(event_release, hipEventDestroy, cuEventDestroy_v2, (void*))                                  \
  X(module_load, hipModuleLoadData, cuModuleLoadData, (void**, const void*))                     \
  X(module_unload, hipModuleUnload, cuModuleUnload, (void*))                                     \
  X(function, hipModuleGetFunction, cuModuleGetFunction, (void**, void*, const char*))           \
  X(launch, hipModuleLaunchKernel, cuLaunchKernel,                                               \
    (void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, \
     void**))                                                                                    \
  X(error_text, hipDrvGetErrorString, cuGetErrorString, (int, const char**))
#define SL_HIP_CALLS(X) X(set_device, hipSetDevice, (int))
#define SL_CUDA_CALLS(X)                              \
  X(context, cuDevicePrimaryCtxRetain, (void**, int)) \
  X(set_context, cuCtxSetCurrent, (void*))            \
  X(set_attribute, cuFuncSetAttribute, (void*, int, int))

// Codes that both vendors share.
constexpr int kOutOfMemory = 2, kInvalidImage = 200, kNoBinaryForGpu = 209;
constexpr int kMaxDynamicShared = 8;      // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kDefaultShared = 48 << 10;  // what a CUDA kernel may have unasked
constexpr unsigned kNonBlocking = 1;      // of a stream
constexpr int kThreadLocal = 1;           // capture: other threads' calls do not matter

class Driver {
 public:
#define SL_FIELD(field, hip, cuda, args) int(*field) args = nullptr;
  SL_DRIVER_CALLS(SL_FIELD)
#undef SL_FIELD
#define SL_FIELD(field, name, args) int(*field) args = nullptr;
  SL_HIP_CALLS(SL_FIELD)
  SL_CUDA_CALLS(SL_FIELD)
#undef SL_FIELD

  // Opens the driver and its first visible device. SL_MISMATCH where there is none.
  sl_status open(bool is_hip) {
    hip_ = is_hip;
    SL_TRY(load());
    SL_TRY(bind());
    int count = 0;
    if (init(0) != 0 || device_count(&count) != 0 || count == 0)
      return fail(SL_MISMATCH,
                  "the %s driver (%s) finds no device; check that this user may use "
                  "it and that %s_VISIBLE_DEVICES does not hide it",
                  vendor(), library_.path().c_str(), vendor());
    SL_TRY(make_current());
    char text[128] = "";
    device_name(text, sizeof text, 0);
    device_ = text;
    return SL_OK;
  }

  // The device for this thread.
  sl_status make_current() {
    if (hip_) return check(set_device(0), "choosing device 0");
    if (!context_) SL_TRY(check(context(&context_, 0), "opening device 0"));
    return check(set_context(context_), "choosing device 0");
  }

  const char* vendor() const { return hip_ ? "HIP" : "CUDA"; }
  bool is_hip() const { return hip_; }
  const std::string& device() const { return device_; }
  // "HIP 60342" or "CUDA 12040", as the driver numbers itself.
  std::string version() const {
    int number = 0;
    driver_version(&number);
    return vendor() + (" " + std::to_string(number));
  }
  bool failed() const { return failed_; }  // an error that nothing on the device outlives

  // SL_OK, or what the driver says of `code` while `doing` it.
  sl_status check(int code, const char* doing) const {
    if (code == 0) return SL_OK;
    const char* text = nullptr;
    if (error_text(code, &text) != 0 || !text) text = "no text for this code";
    if (code == kOutOfMemory) {
      size_t free = 0, total = 0;
      memory(&free, &total);
      return fail(SL_NO_MEMORY, "%s: the device is out of memory (%zu of %zu MB are free)", doing,
                  free >> 20, total >> 20);
    }
    failed_ = true;
    return fail(SL_INTERNAL, "%s: %s error %d (%s) from %s", doing, vendor(), code, text,
                device_.empty() ? "the driver" : device_.c_str());
  }

 private:
  sl_status load() {
    static const char* const hip_names[] = {"libamdhip64.so", "libamdhip64.so.7",
                                            "libamdhip64.so.6", nullptr};
    static const char* const cuda_names[] = {"libcuda.so.1", "libcuda.so", nullptr};
    if (library_.open(std::getenv("SINTERLM_GPU_DRIVER"), hip_ ? hip_names : cuda_names))
      return SL_OK;
    return fail(SL_MISMATCH, "no %s driver: %s; install it, or name it with SINTERLM_GPU_DRIVER",
                vendor(), library_.why().c_str());
  }

  sl_status find(void* field, const char* name) {
    if (library_.find(field, name)) return SL_OK;
    return fail(SL_MISMATCH, "%s has no %s: the %s driver is too old", library_.path().c_str(),
                name, vendor());
  }

  sl_status bind() {
#define SL_BIND(field, hip, cuda, args) SL_TRY(find(&field, hip_ ? #hip : #cuda));
    SL_DRIVER_CALLS(SL_BIND)
#undef SL_BIND
#define SL_BIND(field, name, args) SL_TRY(find(&field, #name));
    if (hip_) {
      SL_HIP_CALLS(SL_BIND)
    } else {
      SL_CUDA_CALLS(SL_BIND)
    }
#undef SL_BIND
    return SL_OK;
  }

  bool hip_ = true;
  mutable bool failed_ = false;
  SharedLibrary library_;
  void* context_ = nullptr;
  std::string device_;
};

// Memory of the device, or of the host where the device can read it; given back at the end.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { reset(); }

  sl_status allocate(const Driver& driver, size_t bytes, const char* what) {
    reset();
    driver_ = &driver;
    char doing[96];
    snprintf(doing, sizeof doing, "allocating %zu MB for %s", (bytes >> 20) + 1, what);
    return driver.check(driver.allocate(&data_, bytes ? bytes : 1), doing);
  }
  sl_status allocate_host(const Driver& driver, size_t bytes) {
    reset();
    driver_ = &driver;
    host_ = true;
    return driver.check(driver.host_allocate(&data_, bytes ? bytes : 1, 0),
                        "allocating memory of the host that the device reads");
  }
  void reset() {
    if (data_) host_ ? driver_->host_release(data_) : driver_->release(data_);
    data_ = nullptr;
  }
  char* data() const { return static_cast<char*>(data_); }

 private:
  const Driver* driver_ = nullptr;
  void* data_ = nullptr;
  bool host_ = false;
};

}  // namespace slg
