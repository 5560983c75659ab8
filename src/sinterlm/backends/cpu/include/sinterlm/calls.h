// What stands around the calls of abi.h in every library, whatever its target: no exception
// crosses, structs of an older caller are refused, and what a step could not do has the same words.
#pragma once
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "sinterlm/error.h"

namespace sl {

template <class F>
sl_status guarded(F&& f) noexcept {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return fail(SL_NO_MEMORY, "out of memory");
  } catch (const std::exception& e) {
    return fail(SL_INTERNAL, "%s", e.what());
  } catch (...) {
    return fail(SL_INTERNAL, "unknown exception");
  }
}

// Refuses null pointers and structs shorter than this library knows.
template <class Args>
sl_status check_call(const char* call, bool objects, const Args* args) {
  if (!objects || !args) return fail(SL_INVALID, "%s: a required pointer is null", call);
  if (args->size < sizeof(Args))
    return fail(SL_MISMATCH, "%s: the caller's struct has %u bytes and this library needs %zu",
                call, args->size, sizeof(Args));
  return SL_OK;
}

// As sl_describe gives a text: at most cap bytes of it; returns those of all of it.
inline int64_t put_text(const std::string& text, char* buf, int64_t cap) {
  const int64_t needed = static_cast<int64_t>(text.size()) + 1;
  if (buf && cap > 0) {
    const int64_t n = std::min(cap, needed) - 1;
    std::memcpy(buf, text.data(), n);
    buf[n] = 0;
  }
  return needed;
}

inline sl_status forked() {
  return fail(SL_INVALID,
              "the model was opened before fork(); open it in the process that runs it");
}

inline sl_status not_finite(int row, int token) {
  return fail(SL_INTERNAL,
              "the logits of sample_rows[%d] (token %d) hold NaN or infinity: weights are damaged "
              "or overflow in this dtype",
              row, token);
}

inline sl_status nothing_allowed(int row) {
  return fail(SL_INVALID, "sampling[%d] allows no token: bias and allowed mask exclude all", row);
}

inline bool is_stop(const sl_sampling& s, int32_t token) {
  const int32_t* end = s.stop_tokens + s.num_stop_tokens;
  return std::find(s.stop_tokens, end, token) != end;
}

}  // namespace sl
