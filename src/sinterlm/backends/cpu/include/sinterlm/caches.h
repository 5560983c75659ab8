// How much last-level cache this process's CPUs share, from sysfs. (sysconf would multiply it by
// the CPUs of the host on some machines.)
#pragma once
#include <sched.h>

#include <cstdint>
#include <cstdio>
#include <set>
#include <string>

namespace sl {

// First line of /sys/devices/system/cpu/cpu<cpu>/cache/index3/<name>; empty when there is none.
inline std::string read_l3(int cpu, const char* name) {
  char path[96], line[256] = {};
  snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cache/index3/%s", cpu, name);
  if (FILE* file = fopen(path, "re")) {
    if (!fgets(line, sizeof line, file)) line[0] = 0;
    fclose(file);
  }
  return line;
}

// Bytes of all distinct L3 caches behind the CPUs of our affinity mask; 0 when unknown.
inline int64_t l3_bytes() {
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) != 0) return 0;
  std::set<std::string> seen;
  int64_t total = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &cpus)) continue;
    const std::string size = read_l3(cpu, "size");  // such as 32768K
    if (size.empty() || !seen.insert(read_l3(cpu, "shared_cpu_list")).second) continue;
    long long number = 0;
    char unit = 0;
    if (sscanf(size.c_str(), "%lld%c", &number, &unit) >= 1)
      total += number << (unit == 'M' ? 20 : unit == 'K' ? 10 : 0);
  }
  return total;
}

}  // namespace sl
