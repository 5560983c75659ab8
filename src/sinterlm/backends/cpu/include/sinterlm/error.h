// Status codes with a message, kept per thread for sl_last_error().
#pragma once
#include <cstdarg>
#include <cstdio>

#include "abi.h"

namespace sl {

inline char* last_error() {
  static thread_local char message[512];
  return message;
}

__attribute__((format(printf, 2, 3))) inline sl_status fail(sl_status status, const char* format,
                                                            ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(last_error(), 512, format, args);
  va_end(args);
  return status;
}

// Leaves the enclosing function with the status of a call that failed.
#define SL_TRY(call)                                                      \
  do {                                                                    \
    if (const sl_status sl_try_status = (call); sl_try_status != SL_OK) { \
      return sl_try_status;                                               \
    }                                                                     \
  } while (0)

}  // namespace sl
