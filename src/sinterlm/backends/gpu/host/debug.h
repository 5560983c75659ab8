// A part of a step, and what lies on the device before and after it.
#pragma once
#include "enqueue.h"

namespace slg {

inline sl_status launch_range(Model& m, int first, int last) {
  const int count = static_cast<int>(m.table.launches.size());
  SL_TRY(sl::check_range("last", last, 0, count));
  SL_TRY(sl::check_range("first", first, 0, last));
  m.first_launch = first;
  m.last_launch = last;
  return SL_OK;
}

inline sl_status copy_named(Model& m, const char* name, void* out, const void* in, int64_t bytes) {
  SL_TRY(check_ready(m));
  void** place = static_cast<void**>(place_of(m, name));
  if (!place || !*place) return fail(SL_INVALID, "%s names nothing of this model's", name);
  SL_TRY(m.driver.make_current());
  const int code = out ? m.driver.to_host(out, *place, bytes, m.stream)
                       : m.driver.to_device(*place, in, bytes, m.stream);
  SL_TRY(m.driver.check(code, name));
  return m.driver.check(m.driver.stream_wait(m.stream), name);
}

}  // namespace slg
